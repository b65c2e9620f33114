"""Read arrays from untrusted pickles: no code in them is executed, and a small pickle cannot fill the memory."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

_MOST = 2**22  # largest number of instructions; 75,000 sequences of strokes have two million


def load(content: bytes) -> Any:
    """Load numbers, strings, lists, tuples and dictionaries of them from a pickle, and arrays as ``Array``.

    Raises:
        Exception: Of any type, if the pickle is damaged, has too many instructions or requests anything else.

    Example:
        >>> import pickle
        >>> load(pickle.dumps({"labels": [1, 2]}))
        {'labels': [1, 2]}
        >>> load(pickle.dumps(print))
        Traceback (most recent call last):
        ...
        _pickle.UnpicklingError: it asks for builtins.print, which no array needs
    """
    try:
        return _Unpickler(content).load()
    except EOFError as error:
        raise pickle.UnpicklingError("it is truncated") from error


class Kind:
    """The data type of an array, as a pickle describes it."""

    def __init__(self, kind: str | bytes, *_: Any):
        self.kind, self.order = _short(kind), "="

    def __setstate__(self, state: tuple):
        self.order = _short(state[1])  # state[0] is a version
        if self.order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("an array has an unknown byte order")


class Array:
    """An array, as a pickle describes it. The description is only stored; NumPy itself would trust a forged one."""

    def __init__(self, *_: Any):
        self.shape, self.kind, self.by_column, self.content = (0,), Kind(""), False, b""

    def __setstate__(self, state: tuple):
        self.shape, self.kind, self.by_column, self.content = state[-4:]  # state[0] is a version
        if type(self.shape) is not tuple or len(self.shape) > 8 or type(self.kind) is not Kind:
            raise pickle.UnpicklingError("it is not an array")
        if not all(type(length) is int and 0 <= length < 2**48 for length in self.shape):
            raise pickle.UnpicklingError("an array has an impossible shape")
        if type(self.content) is not (list if self.kind.kind.startswith("O") else bytes):
            raise pickle.UnpicklingError("it is neither an array of bytes nor one of objects")

    def numbers(self) -> np.ndarray:
        """Return the array of integers or floats, which is read-only."""
        if self.kind.kind not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            raise ValueError(f"an array of type {self.kind.kind!r}, not of numbers")
        array = np.frombuffer(self.content, np.dtype(self.kind.order + self.kind.kind))
        return array.reshape(self.shape, order="F" if self.by_column else "C")


def _short(value: str | bytes) -> str:
    if type(value) not in (str, bytes) or len(value) > 8:  # otherwise a long string could be copied many times
        raise pickle.UnpicklingError("it describes no array")
    return value.decode("latin1") if isinstance(value, bytes) else value  # Python 2 wrote bytes


class _Unpickler(pickle._Unpickler):
    """Unpickler that resolves only the names that an array needs, and replaces them by our own classes.

    It is based on the Python implementation: the C implementation allocates gigabytes for a single wrong bit.
    """

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.dispatch, self._left = _Steps(), len(content)

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): Array,
            ("numpy._core.multiarray", "_reconstruct"): Array,  # since NumPy 2
            ("numpy", "ndarray"): Array,
            ("numpy", "dtype"): Kind,
            ("_codecs", "encode"): self._encode,  # Python 3 wraps bytes like this for Python 2
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return known[module, name]

    def _encode(self, text: str, *_: Any) -> bytes:
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("one string is used in many places")  # each use would be a copy
        return text.encode("latin1")

    def build(self) -> None:
        if type(self.stack[-2]) not in (Array, Kind):  # other objects, even functions, would get new attributes
            raise pickle.UnpicklingError("it sets the state of something other than an array")
        self.load_build()

    def set_item(self) -> None:
        self._check_keys(self.stack[-2:-1])
        self.load_setitem()

    def set_items(self) -> None:
        self._check_keys(self.stack[::2])
        self.load_setitems()

    def dictionary(self) -> None:
        self._check_keys(self.stack[::2])
        self.load_dict()

    def _check_keys(self, keys: list[Any]) -> None:
        if any(type(key) not in (str, bytes) for key in keys):  # hashing nested tuples can take for ever, or crash
            raise pickle.UnpicklingError("it has keys that are not strings")


class _Steps(dict):
    """Dispatch table with the instructions that arrays need. It counts them and stops after ``_MOST``."""

    _NAMES = (
        "PROTO FRAME STOP MARK POP POP_MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE "
        "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
        "SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
        "TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE"
    )

    def __init__(self):
        codes = [getattr(pickle, name)[0] for name in self._NAMES.split()]
        super().__init__({code: pickle._Unpickler.dispatch[code] for code in codes})
        self[pickle.BUILD[0]], self[pickle.DICT[0]] = _Unpickler.build, _Unpickler.dictionary
        self[pickle.SETITEM[0]], self[pickle.SETITEMS[0]] = _Unpickler.set_item, _Unpickler.set_items
        self._left = _MOST

    def __getitem__(self, code: int) -> Callable[[_Unpickler], None]:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError(f"it has more than {_MOST:,} instructions")
        if code not in self:
            raise pickle.UnpicklingError("it has an instruction that no array needs")
        return super().__getitem__(code)
