"""A server of a model as vLLM has it: the model through transformers, behind the part of the protocol that is used."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, GenerationConfig


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # requests that are not accepted yet


@contextmanager
def serving(folder, *, key=None, dies_after=math.inf, lacks=(), besides=(), **about):
    """Serve the model in ``folder``, float32; yields the address of the API, and the requests for completions, which grow.

    Args:
        key: what requests must carry.
        dies_after: completions after which it closes every connection without an answer.
        lacks: what another server than vLLM leaves out of a choice.
        besides: names of other models that it serves.
        about: what it says of the model besides, or in place of what it would say.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own, lock, asked = model.generation_config.to_diff_dict(), threading.Lock(), []
    model.generation_config = GenerationConfig()
    card = dict(id=str(folder), root=str(folder), max_model_len=model.config.max_position_embeddings) | about
    cards = [card, *({"id": name} for name in besides)]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.reply(dict(data=cards) if self.path == "/v1/models" else None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:  # answers one by one
                asked.append(body)
                if len(asked) <= dies_after:
                    choice = complete(model, own, body) if body["model"] == card["id"] else {}
                    kept = {name: value for name, value in choice.items() if name not in lacks}
                    self.reply(dict(choices=[kept]) if choice else None)

        def reply(self, found):
            if key is not None and self.headers["Authorization"] != f"Bearer {key}":
                return self.send_error(401)
            if found is None:
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@torch.no_grad()
def complete(model, own, body):
    """A choice of vLLM's: what is not asked for comes from the model's ``generation_config.json``."""
    ids = torch.tensor([body["prompt"]])
    if body.get("prompt_logprobs") is not None:
        nats = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        known = [{str(token): dict(logprob=value)} for token, value in zip(body["prompt"][1:], nats, strict=True)]
        return dict(prompt_logprobs=[None, *known], finish_reason="length")
    wanted = own | body
    stops = wanted["stop_token_ids"] + ([] if wanted["ignore_eos"] else [model.config.eos_token_id])
    sampling = dict(temperature=wanted["temperature"], top_p=wanted["top_p"], top_k=max(wanted.get("top_k", 0), 0))
    settings = GenerationConfig(
        do_sample=wanted["temperature"] > 0,
        repetition_penalty=wanted.get("repetition_penalty", 1.0),
        max_new_tokens=min(wanted["max_tokens"], wanted.get("max_new_tokens", math.inf)),
        eos_token_id=stops,
        pad_token_id=stops[0],
        **(sampling if wanted["temperature"] else {}),
    )
    torch.manual_seed(wanted["seed"])
    said = model.generate(ids, settings, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
    return dict(token_ids=said, finish_reason="stop" if said[-1] in stops else "length")
