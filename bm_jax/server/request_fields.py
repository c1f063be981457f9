"""Reading JSON from strangers: parse a body, take its fields one at a time, and say what is wrong with them.

Every field is checked for its type and range, null is the same as absent, and whatever is wrong becomes an `ApiError`
that names the field, says what is expected and what was found.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any

from bm_jax.config import ConfigError

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout"}
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Values of fields that ask for nothing; any other is refused."""
NO_EFFECT = ("metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say nothing of the answer."""


class ApiError(Exception):
    """A request that gets no answer: an HTTP status and the JSON that says why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may take of the server."""

    body_bytes: int = 4 * 2**20
    """Longest body of a request."""
    prompt_tokens: int = 65536
    """Longest prompt. With attention layers prompt and completion together."""
    max_tokens: int = 4096
    """Most tokens of one completion."""
    choices: int = 128
    """Most completions of one request: its prompts times `n`."""
    connections: int = 512
    """Most connections at once."""
    body_seconds: float = 30.0
    """Time in which a request must arrive, its head and its body each."""
    request_seconds: float = 600.0
    """Time from a request's arrival to the end of its answer, waiting included."""
    shutdown_seconds: float = 30.0
    """Time that running requests get to finish when the server is told to stop."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (value >= 0 if name == "shutdown_seconds" else value > 0) or not math.isfinite(value):
                raise ConfigError(f"Limits.{name} must be greater than 0, got {value}")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Stricter than Python's own reader: no key twice, no NaN or infinity (a number too large for a float included).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ApiError(400, f"the body has the field {show(twice)} twice")
        return values

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ApiError(400, f"the body has the number {text[:40]}, which is not finite or too large")
        return value

    try:
        values = json.loads(body.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError:
        raise ApiError(400, "the body has an integer of too many digits") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, got {show(values)}")
    return values


class Fields:
    """The fields of a JSON object, each taken once and checked; what nobody took was unknown."""

    def __init__(self, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            raise wrong(where, "an object", values)
        self._where = f"{where}." if where else ""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """The field as it is; None where it is absent."""
        self._known.append(name)
        return self._values.pop(name, None)

    def _checked(self, name: str, kind: type | tuple[type, ...], expected: str, default: Any, low: Any, high: Any) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
            raise wrong(self._where + name, expected, value)
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """An integer from `low` to `high`."""
        return self._checked(name, int, f"an integer from {low} to {high}", default, low, high)

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        """A number from `low` to `high`."""
        return self._checked(name, (int, float), f"a number from {low:g} to {high:g}", default, low, high)

    def boolean(self, name: str) -> bool:
        """true or false; false where it is absent."""
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise wrong(self._where + name, "true or false", value)

    def text(self, name: str, default: Any = None) -> Any:
        """A string of whole characters."""
        value = self.take(name)
        return default if value is None else check_text(value, self._where + name)

    def end(self) -> None:
        """Refuse the fields that were not taken, except where they ask for nothing."""
        for name, value in self._values.items():
            if name in NOTHING_ASKED:
                neutral = NOTHING_ASKED[name]
                if not any(type(value) is type(other) and value == other for other in neutral):
                    allowed = " or ".join(json.dumps(other) for other in neutral)
                    raise wrong(self._where + name, f"absent or {allowed}: it is not supported", value)
            elif name not in NO_EFFECT:
                near = difflib.get_close_matches(name[:40], self._known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ApiError(400, f"there is no field {show(self._where + name)}{hint}", param=name[:80])


def wrong(name: str, expected: str, value: Any) -> ApiError:
    """The error for a field that holds something else than what is expected."""
    return ApiError(400, f"{name} must be {expected}, got {show(value)}", param=name)


def check_text(value: Any, name: str) -> str:
    """`value`, a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{name} is not valid text: half of a character at {error.start}", param=name) from None
    return value


def show(value: Any) -> str:
    """A value in an error: short, and without anything that JSON cannot say."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."
