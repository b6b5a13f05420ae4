"""Hostile files, each made to do one thing if anything in it is run, followed or believed. `CANARY` stands in every
command and `SECRET` in every place that must not be read, so that whoever watches can tell."""

import io
import json
import marshal
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

CANARY, SECRET = "CANARY", "SECRET"
MAGIC = 0x1950A86A20F9469CFC6C
"""What `torch.save` began its files with before they were zip archives (torch/serialization.py)."""


def push(value: object) -> bytes:
    """Opcodes that leave `value` on the stack; bytes are opcodes already."""
    return value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1]


def call(name: str, *arguments: object) -> bytes:
    """Opcodes that leave `name(*arguments)` on the stack. A colon parts module and attribute where there are two."""
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    return f"c{module}\n{attribute}\n(".encode() + b"".join(map(push, arguments)) + b"tR"


def payloads(folder: Path) -> dict[str, bytes]:
    """Opcodes by name; each makes a file called CANARY in `folder`, or tries to reach the network."""
    canary = str(folder / CANARY)
    shell = f"touch {canary}"
    python = f"open({canary!r}, 'w').close()"
    code = pickle.dumps(marshal.dumps(compile(python, "payload", "exec")), 2)[2:-1]
    inner = pickle.dumps(as_pickle(call("os.system", shell)), 2)[2:-1]
    touch = call("pathlib.Path", canary)
    long_way = call("builtins.getattr", call("builtins.__import__", "os"), "system")
    return {
        "os.system": call("os.system", shell),
        "posix.system": call("posix.system", shell),
        "os.popen": call("os.popen", shell),
        "os.remove": call("os.remove", canary),
        "os.rename": call("os.rename", canary, f"{canary}2"),
        "os.mkdir": call("os.mkdir", canary),
        "os.execv": call("os.execv", "/bin/sh", ["sh", "-c", shell]),
        "subprocess.Popen": call("subprocess.Popen", ["sh", "-c", shell]),
        "subprocess.run": call("subprocess.run", ["sh", "-c", shell]),
        "subprocess.getoutput": call("subprocess.getoutput", shell),
        "pty.spawn": call("pty.spawn", ["sh", "-c", shell]),
        "builtins.exec": call("builtins.exec", python),
        "builtins.eval": call("builtins.eval", python),
        "builtins.open": call("builtins.open", canary, "w"),
        "builtins.__import__": call("builtins.__import__", CANARY),
        "getattr": long_way + b"(" + push(shell) + b"tR",
        "importlib": call("importlib.import_module", CANARY),
        "runpy": call("runpy.run_path", str(folder / "run_me.py")),
        "shutil.rmtree": call("shutil.rmtree", canary, True),
        "pathlib": call("pathlib:Path.touch", touch),
        "methodcaller": call("operator.methodcaller", "touch") + b"(" + touch + b"tR",
        "partial": call("functools.partial", b"cos\nsystem\n", shell) + b"(tR",
        "map": call("builtins.list", call("builtins.map", b"cos\nsystem\n", [shell])),
        "code": call("types.FunctionType", call("marshal.loads", code), call("builtins.globals")) + b"(tR",
        "pickle.loads": call("pickle.loads", inner),
        "torch.load": call("torch.load", str(folder / "os.system.pth")),
        "torch.storage": call("torch.storage._load_from_bytes", inner),
        "torch.hub": call("torch.hub.load", str(folder), "run_me", "local"),
        "torch.jit": call("torch.jit.load", str(folder / "os.system.pth")),
        "torch.distributed": call("torch.distributed.init_process_group", "gloo", "tcp://127.0.0.1:9", None, 1, 0),
        "numpy": call("numpy.load", str(folder / "os.system.pth"), None, True),
        "ctypes": call("ctypes.CDLL", str(folder / CANARY)),
        "socket": call("socket.create_connection", ("127.0.0.1", 9)),
        "urlopen": call("urllib.request.urlopen", "http://127.0.0.1:9/"),
        "timeit": call("timeit.timeit", python),
        "pydoc": call("pydoc.pipepager", "", shell),
        "inst": b"(" + push(shell) + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + push(shell) + b"o",
        "stack_global": b"\x8c\x02os\x8c\x06system\x93(" + push(shell) + b"tR",
        "nested": b"}(" + push("state_dict") + b"}(" + push("w") + call("os.system", shell) + b"uu",
    }


def as_pickle(opcodes: bytes) -> bytes:
    return b"\x80\x04" + opcodes + b"."


def as_legacy(opcodes: bytes) -> bytes:
    """As `torch.save` wrote until version 1.6."""
    head = [MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(value, 2) for value in head) + as_pickle(opcodes) + pickle.dumps([], 2)


def as_zip(opcodes: bytes) -> bytes:
    """As `torch.save` writes now."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", as_pickle(opcodes))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def as_tar(opcodes: bytes) -> bytes:
    """As torch wrote in its first versions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = as_pickle(opcodes)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


CONTAINERS: Mapping[str, Callable[[bytes], bytes]] = {
    "pickle": as_pickle,
    "legacy": as_legacy,
    "zip": as_zip,
    "tar": as_tar,
}


def traversals(outside: Path) -> dict[str, str]:
    """File names of annotations that lead to `outside/SECRET.jpg`, which lies beside the image folder, or elsewhere out
    of it; `link*` are links that `make_links` makes."""
    return {
        "parent": f"../{SECRET}.jpg",
        "parent of a folder": f"sub/../../{SECRET}.jpg",
        "dot and parent": f"./../{SECRET}.jpg",
        "back in": "../images/ok.jpg",
        "absolute": str(outside / f"{SECRET}.jpg"),
        "double slash": f"/{outside / SECRET}.jpg",
        "backslashes": f"..\\{SECRET}.jpg",
        "drive": f"C:\\{SECRET}.jpg",
        "nul": f"ok.jpg\0../{SECRET}.jpg",
        "link to a file": "link.jpg",
        "link to a link": "link_to_link.jpg",
        "link to a folder": f"link_folder/{SECRET}.jpg",
        "link loop": "link_loop.jpg",
        "home": f"~/{SECRET}.jpg",
        "variable": f"$HOME/{SECRET}.jpg",
        "url": f"file://{outside}/{SECRET}.jpg",
        "per cent": f"%2e%2e/{SECRET}.jpg",
        "process": "/proc/self/environ",
        "device": "/dev/zero",
        "folder": "..",
        "surrogate": "\ud800.jpg",
    }


def make_links(images: Path) -> None:
    (images / "link.jpg").symlink_to(f"../{SECRET}.jpg")
    (images / "link_to_link.jpg").symlink_to("link.jpg")
    (images / "link_folder").symlink_to("..")
    (images / "link_loop.jpg").symlink_to("link_loop.jpg")


NAMES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<b>&amp;",
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)*2",
    "+1-1",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m8bit",
    "a\r\nerror: forged line",
    "\u202egnp.exe",
    "[bold red]markup[/bold red]",
    "{0.__class__} %s%n ${oc.env:HOME}",
    "../../escaped",
    "\ud800",
)
"""Of classes: markup, formulas of spreadsheets, terminal sequences, forged lines, templates, a path, no character."""


def png(width: int, height: int, data: bytes) -> bytes:
    """A grey PNG whose header says so large; `data` is of any length."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def deep_json(depth: int = 1_000_000) -> bytes:
    return b'{"images": ' + b"[" * depth + b"]" * depth + b"}"


def huge_numbers(annotations: Mapping[str, object]) -> str:
    """The annotation file with integers of up to 10^4 digits in the place of its numbers."""
    long, wide = "9" * 10_000, "9" * 400
    return json.dumps(annotations).replace('"id": 1,', f'"id": {wide},').replace("160", long)


def laughs(levels: int = 12) -> str:
    """Ten to the power of `levels` items once every alias in this YAML is written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"data: {{name: *a{levels - 1}, root: *a{levels - 1}}}", ""])


def claims_much(metadata: str = "{}") -> bytes:
    """A safetensors file whose header says that it is 2^60 bytes long."""
    return struct.pack("<Q", 2**60) + metadata.encode()


def claims_tensor() -> bytes:
    """A safetensors file whose header tells of a tensor of 2^62 bytes."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}).encode()
    return struct.pack("<Q", len(header)) + header


def zip_bomb(weights: bytes, size: int = 2**30) -> bytes:
    """A `.pth` archive, in which the first tensor becomes `size` bytes once it is unpacked from a megabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(weights)) as small, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in small.infolist():
            if not entry.filename.endswith("data/0"):
                archive.writestr(entry.filename, small.read(entry))
                continue
            with archive.open(entry.filename, "w") as record:
                for _ in range(size >> 20):
                    record.write(bytes(1 << 20))
    return buffer.getvalue()
