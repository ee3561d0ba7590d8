"""Damage to a run's files, as disks, tools and enemies do it, and what may come of that.

`damaged_json`, `damaged_lines`, `damaged_toml` and `damaged_bytes` draw what a file may hold afterwards, `in_its_place`
what may stand where the file was. `Watch` makes sure that a command ends, and that it writes nowhere but in the folders
it was given; `command` that it ends well or with one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from daramgpt.cli import app, exit_codes
from daramgpt.launcher import REFUSAL

SECONDS_UNTIL_IT_HANGS = 20.0
# What a folder beside the run holds; nothing may touch it.
KEPT = "kept.txt"
LONG = "가" * 70_000
ESCAPES = (f"../../outside/{KEPT}", "../../outside", f"/proc/self/cwd/{KEPT}", "..", ".", "", "/", "a\\..\\b")
# Values as a file holds them, so that there are some which no JSON of ours has.
NUMBERS = (
    *("0", "1", "-1", "2", "1.5", "-0.0", "1e-320", "1e308", "-1e308", "1e999", "NaN", "Infinity", "-Infinity"),
    *("9" * 12, "9" * 20, "9" * 400, "-" + "9" * 400, "9" * 5000, "2e11", "253402300799", "1e15", "4294967296"),
)
JSON_VALUES = (
    *("null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"a": 1}', '[{"a": 1}]', '"a"', '"1"'),
    *("[" * 400 + "]" * 400, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
    *('"\\ud800"', '"\\u0000"', '"\\n\\r\\u2028"', '"\\u001b[2J"', f'"{LONG}"', '"done"', '"fp16"', '"~nobody/a.json"'),
    *(json.dumps(path) for path in ESCAPES),
    *NUMBERS,
)
TOML_VALUES = (
    *('""', '"a"', '"1"', "true", "false", "[]", "{}", "[[]]", "{a = 1}", "1979-05-27", "'''\n'''", '"\\u0000"'),
    *("[" * 300 + "]" * 300, "[" * 100_000 + "]" * 100_000, "inf", "-inf", "nan", '"\\ud800"', '"~nobody/a.json"'),
    *(f'"{LONG}"', '"999999GB"', f'"{"9" * 5000}GB"', f'"{"9" * 1_100_000}GB"', '"0.000001B"', "0x" + "f" * 5000),
    *(json.dumps(path) for path in ESCAPES),
    *(number for number in NUMBERS if number[-1].isdigit()),
)
NAMES = ("a", "", "files", "step", "x.y", "\x00", "../../outside", "sha256", "\ud800", "가", "enabled", LONG)


class Raw(str):
    """What stands in the text as it is."""


class Pairs(list[list[Any]]):
    """An object as pairs of key and value, which may hold a key twice."""


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def _rendered(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_rendered(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_rendered, node)) + "]"
    return json.dumps(node)


def _containers(node: Any) -> Iterator[Any]:
    if isinstance(node, list):
        yield node
        for child in node:
            yield from _containers(child[1] if isinstance(node, Pairs) else child)


@st.composite
def damaged_json(draw: st.DrawFn, text: str) -> str:
    """One to three values, keys or elements of a JSON text exchanged, removed, doubled or added."""
    root = [_parsed(text)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        container = draw(st.sampled_from(list(_containers(root))))
        value = Raw(draw(st.sampled_from(JSON_VALUES)))
        kind = draw(st.sampled_from(["exchange", "exchange", "exchange", "remove", "double", "add", "rename"]))
        if container is root or (kind == "exchange" and not container):
            kind = "exchange" if container else "add"
        place = draw(st.integers(0, max(0, len(container) - 1)))
        is_object = isinstance(container, Pairs)
        if kind == "exchange":
            if is_object:
                container[place] = [container[place][0], value]
            else:
                container[place] = value
        elif kind == "add" or not container:
            container.insert(place, [draw(st.sampled_from(NAMES)), value] if is_object else value)
        elif kind == "remove":
            del container[place]
        elif kind == "double":
            container.append([container[place][0], value] if is_object else container[place])
        elif is_object:
            container[place] = [draw(st.sampled_from(NAMES)), container[place][1]]
    return _rendered(root[0])


@st.composite
def damaged_lines(draw: st.DrawFn, text: str) -> str:
    """Lines of JSON objects, one to three of them exchanged, removed, doubled, cut, joined or moved."""
    lines = text.splitlines()
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        if not lines:
            break
        place = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["json", "json", "json", "remove", "double", "cut", "join", "move", "value"]))
        if kind == "json":
            with contextlib.suppress(ValueError, RecursionError):
                lines[place] = draw(damaged_json(lines[place]))
        elif kind == "remove":
            del lines[place]
        elif kind == "double":
            lines.insert(place, lines[place])
        elif kind == "cut":
            lines[place] = lines[place][: draw(st.integers(0, len(lines[place])))]
        elif kind == "join":
            lines[place : place + 2] = ["".join(lines[place : place + 2])]
        elif kind == "move":
            lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(place))
        else:
            lines.insert(place, draw(st.sampled_from(JSON_VALUES)))
    return "".join(f"{line}\n" for line in lines)


@st.composite
def damaged_toml(draw: st.DrawFn, text: str) -> str:
    """One to three lines of a TOML text with another value or key, removed, doubled, or added."""
    lines = text.splitlines()
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not lines:
            break
        place = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "double", "add", "rename", "table"]))
        key = lines[place].partition("=")[0].strip()
        value = draw(st.sampled_from(TOML_VALUES))
        name = json.dumps(draw(st.sampled_from(NAMES)))
        if kind == "value" and "=" in lines[place]:
            lines[place] = f"{key} = {value}"
        elif kind == "remove":
            del lines[place]
        elif kind == "double":
            lines.insert(place, lines[place])
        elif kind == "add":
            lines.insert(place, f"{name} = {value}")
        elif kind == "rename" and "=" in lines[place]:
            lines[place] = f"{name} ={lines[place].partition('=')[2]}"
        elif kind == "table":
            section = draw(st.sampled_from(["corpus.datasets", "corpus.formats", "engine", "teacher", "a.b", "corpus"]))
            lines.append(f"[{section}.{name}]\n{name} = {value}")
    return "".join(f"{line}\n" for line in lines)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bits flipped, a part cut off, left out, doubled or filled, bytes put in; or nothing left."""
    found = bytearray(data)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        start, end = sorted((draw(st.integers(0, len(found))), draw(st.integers(0, len(found)))))
        end = min(end, start + draw(st.sampled_from([1, 8, 64, 4096, len(data)])))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "leave out", "double", "fill", "insert", "empty"]))
        if kind == "flip" and start < len(found):
            found[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[start:]
        elif kind == "leave out":
            del found[start:end]
        elif kind == "double":
            found[start:start] = found[start:end]
        elif kind == "fill":
            found[start:end] = bytes(end - start)
        elif kind == "insert":
            found[start:start] = draw(
                st.sampled_from([b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"\n", b"}", b'"', b"9" * 99])
            )
        elif kind == "empty":
            found.clear()
    return bytes(found)


def _a_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside.txt").write_text("inside")


# What may stand in a file's place, by its name; each is given the path, which is free, and the folder beside the run.
IN_ITS_PLACE: dict[str, Callable[[Path, Path], None]] = {
    "nothing": lambda path, outside: None,
    "an empty folder": lambda path, outside: path.mkdir(),
    "a folder": _a_folder,
    "a pipe": lambda path, outside: os.mkfifo(path),
    "a link to nothing": lambda path, outside: path.symlink_to(outside / "not-there"),
    "a link to itself": lambda path, outside: path.symlink_to(path),
    "a link to zeros": lambda path, outside: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path, outside: path.symlink_to(outside / "pipe"),
    "a link to a folder": lambda path, outside: path.symlink_to(outside),
    "a link outside": lambda path, outside: path.symlink_to(outside / KEPT),
}


def put(path: Path, damage: bytes | str, outside: Path) -> None:
    """Replace a file by bytes, or by what stands in its place; see `IN_ITS_PLACE`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        IN_ITS_PLACE[damage](path, outside)


def damages(path: Path) -> st.SearchStrategy[bytes | str]:
    """What may become of a file: other bytes, or the name of what stands in its place."""
    data = path.read_bytes()
    by_kind = {".json": damaged_json, ".jsonl": damaged_lines, ".toml": damaged_toml}
    shaped: list[st.SearchStrategy[Any]] = []
    if path.suffix in by_kind:
        strategy = by_kind[path.suffix](data.decode())
        shaped = [strategy.map(lambda text: text.encode("utf-8", "surrogatepass"))] * 6
    return st.one_of(*shaped, damaged_bytes(data), damaged_bytes(data), st.sampled_from(sorted(IN_ITS_PLACE)))


class Hang(BaseException):
    """No ``except Exception`` may take it for something else."""


class Watch:
    """While it is entered, what is written outside of `folders`, or read in `outside`, is noted.

    Attributes:
        escapes: what was, by event and path.
    """

    _now: Watch | None = None
    _is_hooked = False

    def __init__(self, folders: list[Path], outside: Path) -> None:
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._outside = str(outside)
        self.escapes: list[str] = []

    def __enter__(self) -> Watch:
        if not Watch._is_hooked:
            sys.addaudithook(_audit)
            Watch._is_hooked = True
        self._previous = signal.signal(signal.SIGALRM, _hangs)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_UNTIL_IT_HANGS)
        self._thread = threading.get_ident()
        Watch._now = self
        return self

    def __exit__(self, *_: object) -> None:
        Watch._now = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What the interpreter is about to do."""
        if threading.get_ident() != self._thread:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes, os.PathLike)):
                return
            name = os.fsdecode(path)
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                self._check(event, os.path.realpath(name) if not flags & os.O_NOFOLLOW else _place(name, -1))
            elif _lexical(name).startswith(self._outside):
                self.escapes.append(f"read {name}")
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            self._check(event, _place(arguments[0], arguments[-1]))
        elif event in ("os.rename", "os.link"):
            self._check(event, _place(arguments[0], arguments[2]))
            self._check(event, _place(arguments[1], arguments[3]))
        elif event == "os.symlink":
            self._check(event, _place(arguments[1], arguments[2]))
        elif event in ("os.truncate", "os.chmod", "os.chown", "os.utime", "shutil.rmtree"):
            if not isinstance(arguments[0], int):
                self._check(event, _place(arguments[0], -1))
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            self.escapes.append(f"{event} {arguments[0] if arguments else ''}")

    def _check(self, event: str, path: str) -> None:
        if path == "/dev/null" or "/__pycache__/" in path:
            return
        if not any(path == folder or path.startswith(f"{folder}/") for folder in self._folders):
            self.escapes.append(f"{event} {path}")


def _place(path: Any, folder_descriptor: int) -> str:
    """Where a name lies, links on its way followed but not at its end."""
    name = os.fsdecode(path)
    if folder_descriptor is not None and folder_descriptor >= 0 and not name.startswith("/"):
        name = f"{Path(f'/proc/self/fd/{folder_descriptor}').readlink()}/{name}"
    folder, last = os.path.split(_lexical(name))
    return f"{os.path.realpath(folder)}/{last}"


def _lexical(name: str) -> str:
    """The absolute path that a name spells, whatever is a link on its way."""
    return os.path.normpath(Path.cwd() / name)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    watch = Watch._now
    if watch is not None and (event == "open" or event.startswith(("os.", "shutil.", "subprocess."))):
        watch.note(event, arguments)


def _hangs(number: int, frame: FrameType | None) -> None:
    raise Hang


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and what was printed by a command of the program, in this process.

    Whatever is neither an end nor a refusal of one line comes out as it is.
    """
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    errors.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = exit_codes.guarded(lambda: app(list(arguments), standalone_mode=False))
    said, refusal = (stream.buffer.getvalue().decode() for stream in (output, errors))  # type: ignore[attr-defined]
    if code == 2:
        assert refusal.startswith(REFUSAL) and refusal.count("\n") == 1, refusal
    else:
        assert code in (0, 3), (code, refusal)
    return code, refusal if code == 2 else said


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Of every file of a folder, by name: when it was written and what it holds; of a folder, nothing."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }
