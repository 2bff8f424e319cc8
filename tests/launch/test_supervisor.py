"""The process tree, with real children: python one-liners."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bus.protocol.errors import ConfigurationError, LocalError
from launch.supervisor import ProcessSpec, ProcessTree, RestartPolicy
from tests.launch.kept import KeptLog, is_running, until, wait_gone

QUICK = RestartPolicy(first_s=0.01, max_s=0.05)
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP


def python(name: str, code: str, **env: str) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-c", code), env)


def test_delay_doubles_up_to_the_most_and_starts_over_after_a_long_run() -> None:
    policy = RestartPolicy()
    delays = [policy.next_delay_s(None, 0.0)]
    for _ in range(6):
        delays.append(policy.next_delay_s(delays[-1], 1.0))
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert policy.next_delay_s(10.0, 30.0) == 0.5
    assert policy.next_delay_s(10.0, 29.9) == 10.0


async def test_a_killed_child_is_restarted_and_it_is_said_in_one_line(log: KeptLog) -> None:
    specs = [python("edge-1", SLEEP), python("edge-2", SLEEP)]
    async with ProcessTree(specs, log=log, policy=QUICK) as tree:
        await tree.ready()
        first, other = tree.process("edge-1").pid, tree.process("edge-2").pid
        os.kill(first, signal.SIGKILL)
        await tree.process("edge-1").wait_started(2)
        assert tree.process("edge-1").pid != first
        assert tree.process("edge-2").pid == other
        assert tree.process("edge-1").exit_status == -signal.SIGKILL
    said = [line for line in log.of("edge-1") if line != "up"]
    assert said == ["killed by SIGKILL; starting it again in 0.01 s"]


async def test_a_child_that_dies_often_after_readiness_is_never_given_up(log: KeptLog) -> None:
    async with ProcessTree([python("w", SLEEP)], log=log, policy=QUICK) as tree:
        await tree.ready()
        for starts in range(2, 7):
            os.kill(tree.process("w").pid, signal.SIGKILL)
            await tree.process("w").wait_started(starts)


async def test_lines_of_both_streams_arrive_whole_under_their_name(log: KeptLog) -> None:
    code = (
        "import sys, time; print('out'); print('err', file=sys.stderr); print('x' * 200_000);"
        "sys.stdout.buffer.write(b'\\xff bad\\nno newline'); sys.stdout.flush(); time.sleep(600)"
    )
    async with ProcessTree([python("w", code, PYTHONUNBUFFERED="1")], log=log) as tree:
        await until(lambda: len(log.of("w")) >= 4)
        assert tree.process("w").running
    assert set(log.of("w")[:2]) == {"out", "err"}
    assert log.of("w")[2:] == ["x" * 200_000, "\N{REPLACEMENT CHARACTER} bad", "no newline"]


async def test_lines_of_a_quiet_child_are_kept_and_not_logged(log: KeptLog) -> None:
    spec = ProcessSpec("w", (sys.executable, "-c", SLEEP), quiet=True)
    async with ProcessTree([spec], log=log) as tree:
        await until(lambda: list(tree.process("w").last_lines) == ["up"])
    assert log.lines == []


async def test_stop_lets_children_finish_on_sigterm(log: KeptLog) -> None:
    code = (
        "import signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: (print('drained', flush=True), sys.exit(0)));"
        "print('up', flush=True); time.sleep(600)"
    )
    async with ProcessTree([python("w", code)], log=log) as tree:
        await until(lambda: log.of("w") == ["up"])
        process = tree.process("w")
    assert log.of("w") == ["up", "drained"]
    assert process.exit_status == 0
    assert not process.running


async def test_stop_kills_what_does_not_finish_in_time(log: KeptLog) -> None:
    async with ProcessTree([python("w", DEAF)], log=log, grace_s=0.2) as tree:
        await until(lambda: log.of("w") == ["up"])
        pid = tree.process("w").pid
    assert not is_running(pid)
    assert log.of("w")[1:] == ["still running 0.2 s after SIGTERM; killed"]


async def test_a_cancelled_stop_kills_at_once_and_leaves_nothing(log: KeptLog) -> None:
    tree = ProcessTree([python("w", DEAF), python("v", DEAF)], log=log, grace_s=600)
    tree.start()
    await until(lambda: log.of("w") == log.of("v") == ["up"])
    pids = [process.pid for process in tree.processes]
    stop = asyncio.create_task(tree.stop())
    await asyncio.sleep(0)
    stop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stop
    assert not any(is_running(pid) for pid in pids)


async def test_stop_while_a_child_waits_for_its_restart(log: KeptLog) -> None:
    slow = RestartPolicy(first_s=600)
    async with ProcessTree([python("w", "raise SystemExit(3)")], log=log, policy=slow) as tree:
        await until(lambda: bool(log.of("w")))
        with pytest.raises(LocalError, match="not running"):
            _ = tree.process("w").pid
    assert log.of("w") == ["exited with status 3; starting it again in 600 s"]
    assert tree.process("w").starts == 1


async def test_stop_right_after_start_leaves_nothing(log: KeptLog) -> None:
    before = descendants()
    tree = ProcessTree([python("w", SLEEP)], log=log)
    tree.start()
    await asyncio.sleep(0)
    await tree.stop()
    await until(lambda: descendants() <= before)


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


async def test_a_child_that_cannot_start_ends_ready_with_its_last_words(log: KeptLog) -> None:
    spec = python("cloud-1", "raise SystemExit('no such model: nonsense')")
    async with ProcessTree([spec], log=log, policy=QUICK, probe=_never) as tree:
        with pytest.raises(ConfigurationError, match=r"(?s)cloud-1.*no such model: nonsense"):
            await tree.ready()
        assert tree.process("cloud-1").starts == QUICK.start_attempts


HANG = (
    "import faulthandler, os, pathlib, signal, time; faulthandler.register(signal.SIGUSR1);"
    "pathlib.Path(os.environ['BOOTS']).open('a').write(os.environ['E2SCI_BOOT'] + '\\n');"
)


async def test_a_child_that_hangs_while_it_starts_is_killed_and_started_again(
    log: KeptLog, tmp_path: Path
) -> None:
    boots = tmp_path / "boots"
    once = "if len(pathlib.Path(os.environ['BOOTS']).read_text().split()) > 1: print('up')"
    code = HANG + "\n" + once + "\ntime.sleep(600)"
    policy = RestartPolicy(first_s=0.01, stall_s=0.5)
    started = python("cloud-1", code, BOOTS=str(boots))

    async def probe() -> set[str]:
        return {"cloud-1"} if "up" in log.of("cloud-1") else set()

    async with ProcessTree([started], log=log, policy=policy, probe=probe) as tree:
        await tree.ready()
        assert tree.process("cloud-1").boot == boots.read_text().split()[-1]
    said = log.of("cloud-1")
    assert said[0] == "no progress for 0.5 s while it starts; killed"
    assert any("most recent call first" in line for line in said)
    assert "killed by SIGKILL; starting it again in 0.01 s" in said
    assert len(set(boots.read_text().split())) == 2


async def test_a_child_that_works_while_it_starts_has_not_stalled(log: KeptLog) -> None:
    code = "import time\nwhile True: open('/dev/null', 'wb').write(bytes(2**20)); time.sleep(0.01)"
    policy = RestartPolicy(first_s=0.01, stall_s=0.5)
    async with ProcessTree([python("w", code)], log=log, policy=policy, probe=_never) as tree:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(tree.ready(), 2.0)
        assert tree.process("w").starts == 1


async def test_a_misconfigured_child_is_not_tried_again(log: KeptLog) -> None:
    spec = python("w", "print('bad flag'); raise SystemExit(2)")
    async with ProcessTree([spec], log=log, policy=QUICK, probe=_never) as tree:
        with pytest.raises(ConfigurationError, match="bad flag"):
            await tree.ready()
        assert tree.process("w").starts == 1


async def test_a_missing_program_says_so(log: KeptLog) -> None:
    spec = ProcessSpec("w", ("/nowhere/at-all",))
    async with ProcessTree([spec], log=log, policy=QUICK, probe=_never) as tree:
        with pytest.raises(ConfigurationError, match="cannot start /nowhere/at-all: No such file"):
            await tree.ready()


async def _never() -> set[str]:
    return set()


async def test_a_dead_child_takes_its_own_children_along(log: KeptLog) -> None:
    code = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], stdout=subprocess.DEVNULL);"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    async with ProcessTree([python("w", code)], log=log, policy=QUICK) as tree:
        await until(lambda: bool(log.of("w")))
        grandchild = int(log.of("w")[0])
        os.kill(tree.process("w").pid, signal.SIGKILL)
        await until(lambda: not is_running(grandchild))
        await tree.process("w").wait_started(2)


def test_names_are_unique(log: KeptLog) -> None:
    with pytest.raises(LocalError, match="same name"):
        ProcessTree([python("w", SLEEP), python("w", SLEEP)], log=log)
    with pytest.raises(LocalError, match=r"no process 'x'.* w"):
        ProcessTree([python("w", SLEEP)], log=log).process("x")


SUPERVISOR = """
import asyncio, sys
from launch.supervisor import ProcessSpec, ProcessTree
async def main():
    code = {code!r}
    specs = [ProcessSpec(f"w{{i}}", (sys.executable, "-c", code)) for i in range(3)]
    async with ProcessTree(specs, log=lambda line: None) as tree:
        await tree.ready()
        print(*(process.pid for process in tree.processes), flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def test_no_child_outlives_a_kill_of_the_supervisor(request: pytest.FixtureRequest) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR.format(code=DEAF)],
        stdout=subprocess.PIPE,
        cwd=request.config.rootpath,
        text=True,
    ) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        assert len(pids) == 3
        assert all(is_running(pid) for pid in pids)
        supervisor.kill()
    wait_gone(pids)


async def test_children_learn_their_parent(log: KeptLog) -> None:
    code = "import os, time; print(os.environ['E2SCI_PARENT_PID'], flush=True); time.sleep(600)"
    async with ProcessTree([python("w", code)], log=log):
        await until(lambda: bool(log.of("w")))
    assert log.of("w") == [str(os.getpid())]
