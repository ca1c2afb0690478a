"""Secrets disappear from what is written; nothing else does."""

import pytest

from liftdist.redaction import note_references, redact, redact_tree

SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "PGPASSWORD": "hunter2",
    "db_pass": "correct horse",
    "OPENAI_KEY": "sk-123",
    "GITHUB_PAT": "ghp_abcdef",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_appear_nowhere(name):
    value = SECRETS[name]
    for frame in ("{}", "key={}", "https://user:{}@host/x", "a {} b", '"{}",', "--token={}"):
        found = redact(frame.format(value), SECRETS)
        assert value not in found
        assert f"<{name}>" in found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),  # named like a token, and is none
        ("TOKENIZERS_PARALLELISM", "true"),
        ("USE_TOKEN", "false"),
        ("MAX_TOKEN", "100000"),
        ("TOKEN_COUNT", "2048-8192"),
        ("WARMUP_KEY", "1.0e-4"),
        ("API_KEY", "default"),
        ("GOOGLE_APPLICATION_CREDENTIALS_FILE", "/home/me/key.json"),
        ("HF_TOKEN_PATH", "/root/.cache/token"),
        ("SHORT_SECRET", "abc"),
        ("SLURM_JOB_TOKEN", "something-long"),
        ("KEYBOARD", "qwerty-layout"),
        ("MONKEY", "bananas-and-more"),
    ],
)
def test_what_is_no_secret_is_left_alone(name, value):
    text = f"run_dir=runs/{value}-start learning rate {value}"
    assert redact(text, {name: value}) == text


def test_a_short_secret_is_replaced_as_a_word_alone():
    assert redact("hunter2 hunter22 xhunter2 hunter2-x", {"DB_PASS": "hunter2"}) == (
        "<DB_PASS> hunter22 xhunter2 <DB_PASS>-x"
    )


def test_variables_that_the_config_refers_to_are_secrets(monkeypatch):
    text = "model at value-from-env"
    monkeypatch.setenv("PLAIN_REFERENCE", "value-from-env")
    assert redact(text) == text
    note_references(["model.path=${oc.env:PLAIN_REFERENCE}"])
    assert redact(text) == "model at <PLAIN_REFERENCE>"
    assert redact_tree([text, 3]) == ["model at <PLAIN_REFERENCE>", 3]
