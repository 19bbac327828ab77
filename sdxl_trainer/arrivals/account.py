"""What becomes of each option of another trainer's config: kept, changed, dropped, or not known."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_trainer.errors import UserError, shown

_SECRETS = ("_token", "api_key", "password", "secret")
_OFF: tuple[Any, ...] = (None, "", False, 0, 0.0, [], {})


@dataclass(frozen=True)
class Entry:
    """One option's fate. `fate`: kept, changed, dropped, unknown, or assumed (the other trainer's default, which is
    not ours); `to` and `became` are the option of ours and its value."""

    fate: str
    option: str
    value: Any = None
    to: str = ""
    became: Any = None
    why: str = ""

    def line(self) -> str:
        source = f"{self.option} = {_shown(self.option, self.value)}"
        target = f"{self.to} = {_shown(self.to, self.became)}"
        if self.fate == "note":
            return f"note     {self.why}"
        if not self.option:
            return f"assumed  {target}: {self.why}"
        if self.fate == "kept":
            return f"kept     {source} -> {self.to}"
        if self.fate == "changed":
            return f"changed  {source} -> {target}: {self.why}"
        return f"{self.fate:<8} {source}: {self.why}"


@dataclass
class Account:
    """The options of a config that are still to be accounted for, what was said of the others, and our config's plain
    data as it grows. `place` goes before the names of options in what is said (datasets.0.)."""

    options: dict[str, Any]
    where: str
    place: str = ""
    tree: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    off: list[str] = field(default_factory=list)

    def inner(self, options: Mapping[str, Any], place: str) -> "Account":
        """The account of a part of the config, such as one data set; what it says is said here."""
        prefix = f"{self.place}{place}."
        return Account(dict(options), self.where, prefix, self.tree, self.entries, self.off)

    def has(self, name: str) -> bool:
        """Whether an option is given and not off."""
        return not _off(self.options.get(name))

    def look(self, name: str, default: Any = None) -> Any:
        """An option's value, numbers and switches as such; the option stays to be accounted for."""
        value = plain(self.options.get(name))
        return default if value is None or value == "" else value

    def number(self, name: str, default: Any = None) -> Any:
        """A number. UserError if it is none."""
        value = self.look(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{self.place}{name} = {value!r} is not a number", self.where, "correct it there")
        return value

    def text(self, name: str, default: Any = None) -> Any:
        value = self.options.get(name)
        if value is None or value == "":
            return default
        if isinstance(value, list | dict):
            raise UserError(f"{self.place}{name} is not a word", self.where, "correct it there")
        return str(value)

    def put(self, to: str, value: Any) -> None:
        """Set an option of ours by its dotted name."""
        node: Any = self.tree
        *parents, last = to.split(".")
        for part in parents:
            if isinstance(node, list):
                while len(node) <= int(part):
                    node.append({})
                node = node[int(part)]
            else:
                node = node.setdefault(part, [] if part in {"data", "learn", "token"} else {})
        node[last] = value

    def kept(self, name: str, to: str, value: Any = None) -> None:
        """The option means the same under another name."""
        given = self._pop(name)
        became = plain(given) if value is None else value
        self.put(to, became)
        self.entries.append(Entry("kept", self.place + name, given, to, became))

    def changed(self, name: str, to: str, value: Any, why: str) -> None:
        given = self._pop(name)
        self.put(to, value)
        self.entries.append(Entry("changed", self.place + name, given, to, value, why))

    def dropped(self, name: str, meaning: str) -> None:
        """Nothing here does what the option does; `meaning` is what follows from that."""
        given = self._pop(name)
        if _off(given):
            self.off.append(self.place + name)
        else:
            self.entries.append(Entry("dropped", self.place + name, given, why=meaning))

    def part(self, name: str, why: str) -> None:
        """The option was read together with another one."""
        given = self._pop(name)
        if not _off(given):
            self.entries.append(Entry("kept", self.place + name, given, why))
        elif given is not None:
            self.off.append(self.place + name)

    def assumed(self, to: str, value: Any, why: str) -> None:
        self.put(to, value)
        self.entries.append(Entry("assumed", "", to=to, became=value, why=why))

    def keep_all(self, table: Mapping[str, str]) -> None:
        """Options that mean the same, where they are given and not off."""
        for name, to in table.items():
            if self.has(name):
                self.kept(name, to)

    def drop_all(self, table: Mapping[str, str]) -> None:
        for name, meaning in table.items():
            if name in self.options:
                self.dropped(name, meaning)

    def do_anyway(self, table: Mapping[str, str]) -> None:
        """What the options ask for is done without them."""
        for name, how in table.items():
            if name in self.options:
                if _off(self.options[name]):
                    self.dropped(name, "")
                else:
                    self.part(name, how)

    def unused(self, *names: str) -> None:
        """Options that the source itself does not look at."""
        self.off += [self.place + name for name in names if self.options.pop(name, None) is not None]

    def finish(self) -> None:
        """Whatever is left is off, or not known."""
        for name in sorted(self.options):
            given = self._pop(name)
            if _off(given):
                self.off.append(self.place + name)
            else:
                why = "not known here; nothing of it is in the result"
                self.entries.append(Entry("unknown", self.place + name, given, why=why))

    def undone(self, option: str, why: str) -> None:
        """An option of ours is taken out again, since it does nothing."""
        self.entries[:] = [
            Entry("dropped", e.option, e.value, why=why) if e.to == option and e.option else e
            for e in self.entries
            if e.option or e.to != option
        ]

    def amended(self, to: str, value: Any, why: str) -> None:
        """An option of ours that was set becomes another value."""
        self.put(to, value)
        self.entries[:] = [
            Entry("changed", e.option, e.value, to, value, why) if e.to == to else e for e in self.entries
        ]
        if not any(e.to == to for e in self.entries):
            self.entries.append(Entry("assumed", "", to=to, became=value, why=why))

    def note(self, text: str) -> None:
        self.entries.append(Entry("note", "", why=text))

    def lines(self) -> list[str]:
        order = ("note", "assumed", "kept", "changed", "dropped", "unknown")
        lines = [e.line() for fate in order for e in self.entries if e.fate == fate]
        if self.off:
            names = ", ".join(dict.fromkeys(self.off))
            lines.append(f"off      options that are off, empty, 0, or of something that is not used: {names}")
        return lines

    def counts(self) -> str:
        found = {fate: sum(e.fate == fate for e in self.entries) for fate in ("kept", "changed", "dropped", "unknown")}
        return ", ".join(f"{count} {fate}" for fate, count in found.items())

    def _pop(self, name: str) -> Any:
        return self.options.pop(name, None)


def plain(value: Any) -> Any:
    """Numbers and switches that are written as text, as command lines and web forms write them."""
    if not isinstance(value, str):
        return value
    word = value.strip()
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return value


def pairs(given: Any, where: str) -> dict[str, Any]:
    """`name=value` words, as optimizer and network arguments are written; values as plain data, never evaluated."""
    if isinstance(given, Mapping):
        return {str(key): plain(value) for key, value in given.items()}
    words: Iterable[Any] = given.split() if isinstance(given, str) else given or ()
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = str(word).partition("=")
        if not equals:
            raise UserError(f"'{word}' is not name=value", where, "correct it there")
        parts = [plain(part.strip(" \"'()[]")) for part in value.split(",")]
        found[name.strip(" \"'")] = parts[0] if len(parts) == 1 else parts
    return found


def _off(value: Any) -> bool:
    given = plain(value)
    return any(given is off or (type(given) is type(off) and given == off) for off in _OFF)


def _shown(name: str, value: Any) -> str:
    if name.lower().endswith(_SECRETS):
        return "***"
    return shown(value, 80)
