"""What SLURM answers."""

import subprocess

import pytest

from liftdist.cluster import scheduler

SHOWN = """JobId=12 ArrayJobId=11 ArrayTaskId=3 JobName=x JobState=FAILED Restarts=9
   UserId=u(0) GroupId=u(0) MCS_label=N/A
   Priority=1 Nice=0 Account=a.b QOS=(null) WCKey=x JobState=COMPLETED Restarts=7
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:04 TimeLimit=1-00:10:00 TimeMin=N/A
   StartTime=2026-11-22T10:17:12 EndTime=2026-11-23T10:27:12 Deadline=N/A
   PreemptEligibleTime=2026-11-22T10:17:12 PreemptTime=None
   NodeList=node[2-3]
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=x StdOut=/elsewhere
   Extra=x StdOut=/elsewhere
   Comment=it's me\x0b   StdOut=/elsewhere
   Comment=liftdist: preempted JobState=COMPLETED
   StdOut=/a b/slurm-12.out
"""


def test_fields_of_a_job_are_not_those_that_a_user_wrote():
    fields = scheduler.fields(SHOWN)
    assert fields["JobState"] == "RUNNING"
    assert fields["Restarts"] == "2"
    assert fields["StdOut"] == "/a b/slurm-12.out"
    assert fields["Comment"] == "it's me\x0b   StdOut=/elsewhere"
    assert fields["Account"] == "a.b"
    assert fields["TimeLimit"] == "1-00:10:00"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-0", 172800), ("2-1:30", 178200), ("1-00:00:01", 86401),
        ("UNLIMITED", None), ("", None),
    ],
)  # fmt: skip
def test_times(text, expected):
    assert scheduler.seconds(text) == expected


def test_tables_of_jobs():
    table = "11|3|RUNNING|node[2-3]|None\n11|4|PENDING||Resources\n12|N/A|CANCELLED|node1|a|b\n"
    found = scheduler.parse_table(table)
    assert [known.id for known in found] == ["11_3", "11_4", "12"]
    assert [known.has_ended for known in found] == [False, False, True]
    assert found[2].reason == "a|b"


def test_who_is_asked_when_squeue_has_forgotten(cluster, tmp_path):
    """The first of squeue, sacct and scontrol that answers; here without the first, and there is no accounting."""
    queued = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true", "--job-name=x JobState=COMPLETED"]
    id = subprocess.run(queued, capture_output=True, text=True, check=True).stdout.strip()
    assert [(known.id, known.state) for known in scheduler.jobs([id, "999999", f"{id}_7"])] == [(id, "PENDING")]
    assert [(known.id, known.state) for known in scheduler._scontrol([id], 0)] == [(id, "PENDING")]
    assert scheduler._sacct([id], 0) == []
    subprocess.run(["scancel", id], check=True)
