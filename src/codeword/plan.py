"""A plan: which method compresses which tensor. Readable, hand-editable TOML, the same file in and out.

target = "30x"            # optional: the dial this plan was found for
seed = 0
fold_norms = false        # optional: store batch norms as two vectors, for a net that is not trained again

[[rule]]
tensors = "fc*.weight"    # a glob on tensor names; the first rule that matches a tensor decides
method = "rate-aware"
lam = 0.38
granularity = "tensor"

[[rule]]
tensors = "*"
method = "keep"
"""

from __future__ import annotations

import difflib
import glob
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import tomli_w

from codeword.atomic import replacing
from codeword.errors import PlanError
from codeword.expr import FLOATS
from codeword.methods import BuiltIn, Keep, Method
from codeword.sources import TensorInfo

METHODS: dict[str, type] = {method.__struct_config__.tag: method for method in get_args(BuiltIn)}
_PLAN_FIELDS = ("target", "seed", "fold_norms", "rule")


@dataclass(frozen=True, slots=True)
class Rule:
    """A glob on tensor names and the method for what it matches."""

    tensors: str
    method: Method


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered rules. The first whose glob matches a tensor's name decides; a tensor that none matches is an error."""

    rules: tuple[Rule, ...]
    seed: int = 0
    target: str | None = None
    fold_norms: bool = False  # those whose weight and bias it approximates, and whose statistics it keeps

    def resolve(self, infos: Iterable[TensorInfo]) -> dict[str, Method]:
        """The method of every tensor that holds its own values.

        Integer tensors are kept as they are under a glob; named outright for clustering they are an error. Raises
        PlanError for a tensor without a rule and for a rule that matches no tensor.
        """
        infos = tuple(infos)
        used = [False] * len(self.rules)
        methods: dict[str, Method] = {}
        for info in infos:
            index = next((i for i, rule in enumerate(self.rules) if fnmatchcase(info.name, rule.tensors)), None)
            if index is None:
                raise PlanError(
                    f"no rule matches tensor {info.name!r}; end the plan with a rule for the rest: "
                    'tensors = "*", method = "keep"'
                )
            used[index] = True
            rule = self.rules[index]
            method = rule.method
            if info.dtype not in FLOATS and not isinstance(method, Keep):
                if rule.tensors == info.name:
                    raise PlanError(
                        f"rule[{index}]: tensor {info.name!r} is {info.dtype}; only floats can be clustered"
                    )
                method = Keep()
            if info.tied_to is None:
                methods[info.name] = method
        for index, rule in enumerate(self.rules):
            # A last catch-all may have nothing left to catch; any other idle rule is a mistake to hear about.
            if not used[index] and rule.tensors != "*":
                raise PlanError(f"rule[{index}]: {unmatched(rule.tensors, infos)}, or an earlier rule takes them all")
        return methods

    @classmethod
    def of(
        cls,
        methods: Mapping[str, Method],
        infos: Iterable[TensorInfo],
        seed: int,
        target: str | None,
        *,
        fold_norms: bool = False,
    ) -> Plan:
        """The plan that says a method for each tensor by name; tied tensors are named for completeness."""
        rules = (Rule(glob.escape(info.name), methods.get(info.name, Keep())) for info in infos)
        return cls(tuple(rules), seed, target, fold_norms)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a TOML plan. Raises PlanError naming the field and the nearest valid name."""
        where = os.fspath(path)
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{where}: cannot be read: {error.strerror}; check the path and its permissions") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{where}: not TOML: {error}") from None
        return cls.from_dict(content, where)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "plan") -> Plan:
        """A plan from what TOML or JSON holds. Raises PlanError with the path to the field at fault."""
        _check_names(content, _PLAN_FIELDS, where)
        rules = content.get("rule", [])
        if not isinstance(rules, list) or not rules:
            raise PlanError(f"{where}: needs at least one [[rule]]")
        seed, target = content.get("seed", 0), content.get("target")
        if type(seed) is not int or seed < 0:
            raise PlanError(f"{where}: seed must be a whole number >= 0, got {seed!r}")
        if target is not None and not isinstance(target, str):
            raise PlanError(f'{where}: target must be a string such as "30x", got {target!r}')
        fold_norms = content.get("fold_norms", False)
        if not isinstance(fold_norms, bool):
            raise PlanError(f"{where}: fold_norms must be true or false, got {fold_norms!r}")
        read = tuple(_rule(rule, f"{where}: rule[{i}]") for i, rule in enumerate(rules))
        return cls(read, seed, target, fold_norms)

    def to_dict(self) -> dict[str, Any]:
        """The plan as TOML would hold it. Raises PlanError for a method that is not built in."""
        rules = []
        for rule in self.rules:
            if not isinstance(rule.method, BuiltIn):
                raise PlanError(
                    f"the method of {rule.tensors!r}, {rule.method!r}, is not built in: no plan file holds it"
                )
            rules.append({"tensors": rule.tensors} | _without_none(msgspec.to_builtins(rule.method)))
        head: dict[str, Any] = {"seed": self.seed} | ({} if self.target is None else {"target": self.target})
        head |= {"fold_norms": True} if self.fold_norms else {}
        return head | {"rule": rules}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as TOML, atomically. Raises WriteError, or PlanError for a method that is not built in."""
        content = self.to_dict()
        rules = content.pop("rule")  # a table each: left to itself tomli_w writes short ones inline, long ones not
        text = tomli_w.dumps(content) + "".join(f"\n[{tomli_w.dumps({'rule': rule})}" for rule in rules)
        text = text.replace("\n[[rule]\n", "\n[[rule]]\n")
        with replacing(path) as file:
            file.write(text.encode())


def select(infos: Sequence[TensorInfo], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Names that match a glob of `include` (all, if there is none) and none of `exclude`.

    Raises PlanError for a glob that matches nothing.
    """
    # A lone glob is a sequence too, of its letters.
    include, exclude = ((globs,) if isinstance(globs, str) else globs for globs in (include, exclude))
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(info.name, pattern) for info in infos):
            raise PlanError(unmatched(pattern, infos))
    return {
        info.name
        for info in infos
        if (not include or any(fnmatchcase(info.name, pattern) for pattern in include))
        and not any(fnmatchcase(info.name, pattern) for pattern in exclude)
    }


def unmatched(pattern: str, infos: Iterable[TensorInfo]) -> str:
    """What to say of a glob that matches no tensor."""
    names = [info.name for info in infos]
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or names[:1]
    escaped = glob.escape(near[0])
    special = "" if escaped == near[0] else f", as a glob {escaped!r}"
    return f"{pattern!r} matches none of {len(names)} tensors (the nearest name is {near[0]!r}{special})"


def parse_method(text: str) -> Method:
    """A method from one line, `name` or `name:option=value,...`, as in `--method kmeans:n_clusters=16`.

    Values are TOML's; a word needs no quotes. Options of a method within a method are dotted: `start=kmeans`,
    `start.n_clusters=16`. Raises PlanError naming the option and the nearest valid name.
    """
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {"method": name.strip()}
    for option in rest.split(",") if rest else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not key or not value:
            raise PlanError(f"method {text!r}: {option.strip()!r} is no option=value; write name:option=value,...")
        *path, last = key.split(".")
        table: dict[str, Any] = fields
        for part in path:
            inner: Any = table.get(part, {})
            inner = {"method": inner} if isinstance(inner, str) else inner  # `start=kmeans` came before
            if not isinstance(inner, dict):
                raise PlanError(f"method {text!r}: {part} is {inner!r} and can have no option {last!r}")
            table[part] = table = inner
        table[last] = _toml_value(value)
    return _method(fields, f"method {text!r}")


def method_line(method: Method) -> str:
    """A method as `parse_method` reads it, with the options that are not as they are by default."""
    return _line(method) if isinstance(method, BuiltIn) else repr(method)


def _line(method: Any) -> str:  # noqa: ANN401 - a struct of any method
    options = list(_options(method, ""))
    name = method.__struct_config__.tag
    return f"{name}:{','.join(options)}" if options else name


def _options(method: Any, path: str) -> Iterator[str]:  # noqa: ANN401 - a struct of any method
    for field in msgspec.structs.fields(method):
        value = getattr(method, field.name)
        if value == field.default:
            continue
        if isinstance(value, msgspec.Struct):
            yield f"{path}{field.name}={value.__struct_config__.tag}"
            yield from _options(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}={str(value).lower() if isinstance(value, bool) else value}"


def _toml_value(text: str) -> Any:  # noqa: ANN401
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    """What TOML can hold, in tables within tables too."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if value is not None
    }


def _rule(content: object, where: str) -> Rule:
    if not isinstance(content, dict):
        raise PlanError(f"{where}: must be a table, got {content!r}")
    fields = dict(content)
    tensors = fields.pop("tensors", None)
    if not isinstance(tensors, str) or not tensors:
        raise PlanError(f'{where}.tensors: must be a glob such as "layer1.*", got {tensors!r}')
    return Rule(tensors, _method(fields, where))


def _method(fields: Mapping[str, Any], where: str, methods: Mapping[str, type] = METHODS) -> Method:
    """The method that a table names, one of `methods`; those in tables within it are looked at first."""
    name = fields.get("method")
    if not isinstance(name, str) or name not in methods:
        raise PlanError(f"{where}.method: {name!r} is no method{_here(name)}{_nearest(str(name), methods)}")
    method = methods[name]
    _check_names(fields, ("method", *method.__struct_fields__), where)
    hints, fields = get_type_hints(method), dict(fields)
    for key, value in fields.items():
        inner = {tag: kind for tag, kind in METHODS.items() if kind in get_args(hints.get(key))}
        if inner:
            fields[key] = {"method": value} if isinstance(value, str) else value  # a name alone: no options given
            if not isinstance(fields[key], dict):
                raise PlanError(f"{where}.{key}: must be a method's name or table, got {value!r}")
            _method(fields[key], f"{where}.{key}", inner)
    try:
        return msgspec.convert(fields, method)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        # Where words are to choose from, msgspec says which is wrong and not which are right.
        choices = [word for word in get_args(hints.get(path[1:])) if isinstance(word, str)]
        hint = _nearest(str(fields.get(path[1:])), choices) if choices else ""
        raise PlanError(f"{where}{path}: {text}{hint}") from None
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _here(name: object) -> str:
    return " that can stand here" if isinstance(name, str) and name in METHODS else ""


def _check_names(content: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    for key in content:
        if key not in valid:
            raise PlanError(f"{where}.{key}: unknown field{_nearest(key, valid)}")


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; valid are {', '.join(valid)}"
