"""A calculator with exact numbers: calculate("(1.5 + 0.1) * 3") is "4.8".

    numbers      12  0.5  .5  1e3  1,000  15% (before an operator or at the end; elsewhere % is the remainder)  pi
    operators    + - * / // % ** ^ ( )      also × ÷ · − ² ³ and full-width characters
    functions    sqrt(x)  abs(x)  round(x)  round(x, digits)  min(x, …)  max(x, …)

Python's `ast` parses the text; `_value` computes the listed kinds of nodes and rejects all others, and nothing is run.
Numbers are fractions, so 0.1 + 0.2 is 0.3. Roots have 30 digits; results without a short exact form are rounded to 12.
Limits on length, digits and exponents bound the time to milliseconds. Called by tools.py.
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from fractions import Fraction

MAX_EXPRESSION = 200  # characters
MAX_NUMBER_BITS = 3400  # of a numerator or denominator: 1,023 digits
SHOWN_INTEGER, SHOWN_EXACT, SHOWN_DIGITS = 40, 20, 12  # digits of an integer, of an exact and of a rounded decimal
NO_EXPRESSION = "not an arithmetic expression: use numbers, + - * / ** % ( ), sqrt, abs, round, min, max"

_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SPELLINGS = str.maketrans(dict(zip("×✕·∙÷−–—^²³", ["*"] * 4 + ["/"] + ["-"] * 3 + ["**", "**2", "**3"], strict=True)))
_ALLOWED = re.compile(r"[0-9a-zA-Z+\-*/%(),. ]+")
_EXPONENT = re.compile(r"(?<=[\d.])[eE](?=[-+]?\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(,\d{3})+(?![\d,])")
_PERCENT = re.compile(r"(\d+\.?\d*|\.\d+) ?%(?= ?(?:[-+*/),]|$))")
_PI = Fraction("3.14159265358979323846264338327950288")


def calculate(expression: str) -> str:
    """The value of an expression as text. Raises ValueError with a message for anything that has none."""
    text = _to_python(expression)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(NO_EXPRESSION) from None
    return format_exact(_value(tree.body, text))


def format_exact(number: Fraction) -> str:
    """An integer or a decimal in full if it is exact and short, else rounded to SHOWN_DIGITS digits."""
    if number.denominator == 1 and abs(number) < 10**SHOWN_INTEGER:
        return str(number.numerator)
    top, bottom = Decimal(number.numerator), Decimal(number.denominator)
    decimal = Context(SHOWN_EXACT).divide(top, bottom)
    if Fraction(decimal) != number:
        decimal = Context(SHOWN_DIGITS).divide(top, bottom)
    is_plain = -7 <= decimal.adjusted() < SHOWN_EXACT
    digits, e, exponent = (f"{decimal:f}" if is_plain else f"{decimal:e}").partition("e")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + e + exponent


def _to_python(expression: str) -> str:
    """The expression in Python's spelling, with known names only."""
    text = " ".join(expression.translate(_FULL_WIDTH).translate(_SPELLINGS).split()).rstrip("=? ")
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"longer than {MAX_EXPRESSION} characters")
    names = re.findall("[a-zA-Z]+", _EXPONENT.sub("", text))
    if not _ALLOWED.fullmatch(text) or any(name != "pi" and name not in _FUNCTIONS for name in names):
        raise ValueError(NO_EXPRESSION)
    if not names:  # max(1,234) has two numbers
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    return _PERCENT.sub(r"(\1/100)", text)


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return _number(text[node.col_offset : node.end_col_offset])
        case ast.Name(id="pi"):
            return _PI
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _value(node.operand, text)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp() if compute := _OPERATORS.get(type(node.op)):
            return _bounded(compute(_value(node.left, text), _value(node.right, text)))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            count, function = _FUNCTIONS[name]
            if len(node.args) in count:
                return _bounded(function(*(_value(argument, text) for argument in node.args)))
            raise ValueError(f"{name} has {len(node.args)} values: give {min(count)} to {max(count)}")
    raise ValueError(NO_EXPRESSION)


def _number(digits: str) -> Fraction:
    if len(digits.lower().partition("e")[2]) > 5:
        raise ValueError("too many digits")
    return _bounded(Fraction(digits))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_NUMBER_BITS:
        raise ValueError("too many digits")
    return number


def _division(compute: Callable[[Fraction, Fraction], Fraction]) -> Callable[[Fraction, Fraction], Fraction]:
    def divide(a: Fraction, b: Fraction) -> Fraction:
        if not b:
            raise ValueError("division by zero")
        return Fraction(compute(a, b))

    return divide


def _power(a: Fraction, b: Fraction) -> Fraction:
    """a**b, exact for an integer b, else with 30 digits. Too many digits are found before they are computed."""
    if not a and b < 0:
        raise ValueError("division by zero")
    if b.denominator == 1:
        if (max(a.numerator.bit_length(), a.denominator.bit_length()) - 1) * abs(b) > MAX_NUMBER_BITS:
            raise ValueError("too many digits")
        return Fraction(a ** int(b))
    if a < 0:
        raise ValueError("a root of a negative number")
    with localcontext(Context(prec=30, Emax=999, Emin=-999)):
        try:
            base = Decimal(a.numerator) / Decimal(a.denominator)
            return Fraction(base ** (Decimal(b.numerator) / Decimal(b.denominator)))
        except ArithmeticError:
            raise ValueError("too many digits") from None


def _sqrt(a: Fraction) -> Fraction:
    if a < 0:
        raise ValueError("a root of a negative number")
    with localcontext(Context(prec=30)):
        return Fraction((Decimal(a.numerator) / Decimal(a.denominator)).sqrt())


def _round(number: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    """Half away from zero, as in school: 2.5 is 3."""
    if digits.denominator != 1 or abs(digits) > 100:
        raise ValueError("round to a whole number of digits, at most 100")
    scale = Fraction(10) ** int(digits)
    rounded = (abs(number) * scale + Fraction(1, 2)).__floor__()
    return (rounded if number >= 0 else -rounded) / scale


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _division(operator.truediv),
    ast.FloorDiv: _division(operator.floordiv),
    ast.Mod: _division(operator.mod),
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, tuple[range, Callable[..., Fraction]]] = {
    "sqrt": (range(1, 2), _sqrt),
    "abs": (range(1, 2), abs),
    "round": (range(1, 3), _round),
    "min": (range(2, 20), min),
    "max": (range(2, 20), max),
}
