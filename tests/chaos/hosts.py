"""torchrun on two hosts: two network namespaces of this machine, joined by a cable (veth) alone."""

import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from .kill import END_WITHIN
from .runs import Life, Outcome, command, differences, saved_step, send, uninterrupted, wait_for

ADDRESSES = ("10.231.0.1", "10.231.0.2")
VICTIMS = ("rank 1", "agent 1", "rank 0", "agent 0", "host 1")
LENGTH = 60
NAMES_RANK_AND_STEP = re.compile(r"\brank \d+\b.*\bstep \d+\b")


def why_not() -> str:
    """Why there can be no namespaces here, or nothing."""
    try:
        words = ["unshare", "-rn", "sh", "-c"]
        made = subprocess.run([*words, "ip link add v0 type veth peer name v1"], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no `unshare` here (util-linux)"
    return f"network namespaces are not permitted here: {made.stderr.strip()}" if made.returncode else ""


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """The words to put before a command, for either host. Raises subprocess.CalledProcessError."""
    with ExitStack() as stack:
        first = _holder(stack, "unshare", "-rn")
        enter = ["nsenter", "-t", str(first), "-U", "-n", "--preserve-credentials"]
        second = _holder(stack, *enter, "unshare", "-n")
        hosts = [enter, [*enter[:2], str(second), *enter[3:]]]
        subprocess.run([*enter, *f"ip link add cable0 type veth peer name cable1 netns {second}".split()], check=True)
        for number, (host, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
            for words in (f"addr add {address}/24 dev cable{number}", f"link set cable{number} up", "link set lo up"):
                subprocess.run([*host, "ip", *words.split()], check=True)
        yield hosts


def _holder(stack: ExitStack, *words: str) -> int:
    """A process that does nothing but hold a network namespace of its own."""
    process = stack.enter_context(subprocess.Popen([*words, "sleep", "100000"]))
    stack.callback(process.kill)
    name = Path(f"/proc/{process.pid}/comm")  # `sleep` begins once the namespace is entered and its user mapped to root
    if not wait_for(lambda: process.poll() is not None or name.read_text() == "sleep\n") or process.poll() is not None:
        raise RuntimeError(f"{' '.join(words)} made no namespace")
    return process.pid


def hosts_fail(folder: Path, *, victims: tuple[str, ...] = VICTIMS, seed: int = 0) -> Outcome:
    """One rank on each of two hosts. A rank, an agent (torchrun itself) or a whole host is killed at a random instant
    of the training; everything must end by itself in time, and where a rank was lost the other one says so in one line.
    The same commands go on, and the result is that of two ranks on one host, undisturbed."""
    fault = "two hosts: rank, torchrun or host killed"
    if reason := why_not():
        return Outcome(fault, 0, 0, f"skipped: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    reference, _ = uninterrupted(folder, "one-host", command("one-host", ranks=2, train__length=LENGTH))
    run = folder / "two-hosts" / "tiny"
    faults, slowest = [], 0.0
    with two_hosts() as hosts:
        for victim in victims:
            with _both(hosts, folder) as agents:
                _saves_again(run, agents)
                time.sleep(chance.uniform(0, 0.5))
                if not all(agent.alive() for agent in agents):
                    faults.append(f"{victim} was to be killed, but: {agents[0].said()[-500:]}{agents[1].said()[-500:]}")
                    continue
                struck = time.monotonic()
                _kill(victim, agents)
                ended = [agent.wait_all(END_WITHIN) for agent in agents]
                slowest = max(slowest, time.monotonic() - struck)
                if not all(ended):
                    faults.append(f"processes were left {END_WITHIN:.0f} s after {victim} was killed")
                survivor = agents[1 - int(victim[-1])]
                told = [line for line in survivor.said().splitlines() if NAMES_RANK_AND_STEP.search(line)]
                if not victim.startswith("agent") and len(told) != 1:
                    faults.append(f"{len(told)} lines name rank and step after {victim} was killed: {told}")
        with _both(hosts, folder) as agents:
            if any(agent.wait() != 0 for agent in agents):
                faults.append(f"not completed: {agents[0].said()[-500:]}{agents[1].said()[-500:]}")
            elif differs := differences(reference, run):
                faults.append(f"differs in {', '.join(differs)}")
    notes = "; ".join([f"all ended within {slowest:.0f} s", *faults])
    return Outcome(fault, len(victims), max(0, len(victims) - len(faults)), notes)


def host_vanishes(folder: Path, *, kills: int = 3, seed: int = 0) -> Outcome:
    """A spot machine: host 1 is gone at a random instant, the same command is typed on both hosts once the other has
    ended, and training is waited for. The notes say what that costs: steps that are done again, and seconds."""
    fault = "a host vanishes, plain relaunch"
    if reason := why_not():
        return Outcome(fault, 0, 0, f"skipped: {reason}")
    folder.mkdir(parents=True, exist_ok=True)
    chance, every = random.Random(seed), 10
    options = {"runs": "vanishing", "train__length": 100_000, "train__save_every": every, "train__log_every": 1}
    run = folder / "vanishing" / "tiny"
    lost, noticed, resumed = list[int](), list[float](), list[float]()
    with two_hosts() as hosts:
        for _ in range(kills + 1):
            before, begin = saved_step(run), time.monotonic()
            with _both(hosts, folder, **options) as agents:
                if not wait_for(partial(_trains_beyond, before, run, begin)):
                    return Outcome(fault, kills, len(lost), f"not resumed: {agents[0].said()[-500:]}")
                resumed.append(time.monotonic() - begin)
                _saves_again(run, agents)
                time.sleep(chance.uniform(0, 2))
                struck = time.monotonic()
                agents[1].kill_all()
                if not agents[0].wait_all(END_WITHIN):
                    return Outcome(fault, kills, len(lost), f"processes were left {END_WITHIN:.0f} s later")
                noticed.append(time.monotonic() - struck)
                lost.append(_logged_step(run, begin) - saved_step(run))
    numbers = f"steps lost {lost} with save_every={every}, all ended after {max(noticed):.1f} s"
    seconds = ", ".join(f"{one:.1f}" for one in resumed[1:])
    return Outcome(fault, kills, len(resumed) - 1, f"{numbers}, the next step {seconds} s after the relaunch")


def _trains_beyond(step: int, run: Path, since: float) -> bool:
    return _logged_step(run, since) > step


def _logged_step(run: Path, since: float) -> int:
    """Step of the newest line of metrics.jsonl that was written after that time, or 0."""
    file = run / "metrics.jsonl"
    if not file.is_file() or file.stat().st_mtime < time.time() - (time.monotonic() - since):
        return 0
    steps = re.findall(r'"step": (\d+)', file.read_text())
    return int(steps[-1]) if steps else 0


@contextmanager
def _both(
    hosts: list[list[str]], folder: Path, *, runs: str = "two-hosts", train__length: int = LENGTH, **changes: object
) -> Iterator[list[Life]]:
    """The same command typed on both hosts."""
    words = command(runs, ranks=2, train__length=train__length, **changes)
    at = words.index("--standalone")
    with ExitStack() as stack:
        agents = []
        for number, host in enumerate(hosts):
            rendezvous = [f"--node_rank={number}", f"--master_addr={ADDRESSES[0]}", "--master_port=29511"]
            own = [*words[:at], "--nnodes=2", "--nproc_per_node=1", *rendezvous, *words[at + 2 :]]
            life = Life([*host, *own], folder=folder, GLOO_SOCKET_IFNAME=f"cable{number}")
            agents.append(stack.enter_context(life))
        yield agents


def _saves_again(run: Path, agents: list[Life]) -> None:
    before = saved_step(run)
    wait_for(lambda: saved_step(run) > before or not all(agent.alive() for agent in agents), pause=0.01)


def _kill(victim: str, agents: list[Life]) -> None:
    kind, number = victim.split()
    agent = agents[int(number)]
    if kind == "host":
        agent.kill_all()
    else:
        pid = agent.rank(int(number)) if kind == "rank" else agent.process.pid
        send(pid or agent.process.pid, signal.SIGKILL)
