"""The instructions of Python's interpreter that branch-free code may consist of, by version.

The list holds what is known, as in :mod:`bilevel.replay.pure_names`. A function with a missing instruction is evaluated
at each step, and so is every function in a Python version without a list. The instructions below move objects, make
containers, run a loop, or call what the code names.
"""

from __future__ import annotations

import dis
import sys

__all__ = ["has_list", "is_known_step"]


def _split(names: str) -> frozenset[str]:
    return frozenset(names.split())


_ALWAYS = _split("""
    NOP POP_TOP EXTENDED_ARG LOAD_CONST LOAD_FAST STORE_FAST DELETE_FAST LOAD_GLOBAL LOAD_DEREF STORE_DEREF DELETE_DEREF LOAD_CLOSURE LOAD_ATTR
    UNARY_NEGATIVE UNARY_NOT UNARY_INVERT BINARY_SUBSCR STORE_SUBSCR DELETE_SUBSCR COMPARE_OP CONTAINS_OP GET_ITER FOR_ITER JUMP_FORWARD
    BUILD_TUPLE BUILD_LIST BUILD_MAP BUILD_CONST_KEY_MAP BUILD_STRING BUILD_SLICE LIST_APPEND LIST_EXTEND MAP_ADD DICT_MERGE DICT_UPDATE
    UNPACK_SEQUENCE UNPACK_EX MAKE_FUNCTION CALL_FUNCTION_EX RETURN_VALUE YIELD_VALUE
""")
_SINCE_3_11 = _split("""
    CACHE RESUME PUSH_NULL CALL MAKE_CELL COPY_FREE_VARS COPY SWAP BINARY_OP JUMP_BACKWARD RETURN_GENERATOR
""")
# The last of these stands where an error leaves a comprehension or a generator, and handles none.
_SINCE_3_12 = _SINCE_3_11 | _split("""
    BINARY_SLICE STORE_SLICE RETURN_CONST END_FOR LOAD_FAST_CHECK LOAD_FAST_AND_CLEAR CALL_INTRINSIC_1 RERAISE
""")
_BY_VERSION = {
    (3, 10): _ALWAYS | _split("""
        ROT_TWO ROT_THREE ROT_FOUR ROT_N DUP_TOP DUP_TOP_TWO UNARY_POSITIVE BINARY_POWER BINARY_MULTIPLY BINARY_MATRIX_MULTIPLY BINARY_MODULO
        BINARY_ADD BINARY_SUBTRACT BINARY_FLOOR_DIVIDE BINARY_TRUE_DIVIDE BINARY_LSHIFT BINARY_RSHIFT BINARY_AND BINARY_XOR BINARY_OR INPLACE_POWER
        INPLACE_MULTIPLY INPLACE_MATRIX_MULTIPLY INPLACE_MODULO INPLACE_ADD INPLACE_SUBTRACT INPLACE_FLOOR_DIVIDE INPLACE_TRUE_DIVIDE INPLACE_LSHIFT
        INPLACE_RSHIFT INPLACE_AND INPLACE_XOR INPLACE_OR LIST_TO_TUPLE FORMAT_VALUE LOAD_METHOD CALL_METHOD CALL_FUNCTION CALL_FUNCTION_KW
        JUMP_ABSOLUTE GEN_START
    """),
    (3, 11): _ALWAYS | _SINCE_3_11 | _split("PRECALL KW_NAMES UNARY_POSITIVE LIST_TO_TUPLE FORMAT_VALUE LOAD_METHOD"),
    (3, 12): _ALWAYS | _SINCE_3_12 | _split("KW_NAMES FORMAT_VALUE"),
    (3, 13): _ALWAYS | _SINCE_3_12 | _split("""
        CALL_KW SET_FUNCTION_ATTRIBUTE TO_BOOL FORMAT_SIMPLE FORMAT_WITH_SPEC CONVERT_VALUE LOAD_FAST_LOAD_FAST STORE_FAST_LOAD_FAST
        STORE_FAST_STORE_FAST
    """),
}  # fmt: skip
# What one instruction does by its number: what ends a generator, +x, and a tuple made of a list.
_INTRINSICS = (3, 5, 6)


def is_known_step(step: dis.Instruction, version: tuple[int, int] = sys.version_info[:2]) -> bool:
    """Return whether an instruction is on the list of a version of Python, this one unless said."""
    known = step.opname in _BY_VERSION.get(version, ())
    return known and (step.opname != "CALL_INTRINSIC_1" or step.arg in _INTRINSICS)


def has_list() -> bool:
    """Return whether the instructions of this version of Python are on a list."""
    return sys.version_info[:2] in _BY_VERSION
