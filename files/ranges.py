"""The range of values to read images of more than 8 bits by: whether a set needs one, and which."""

from collections.abc import Sequence

from files.pixels import NARROW

# Of each number format the lowest and the highest value of each image.
Values = dict[str, list[tuple[float, float]]]


def span(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The lowest and the highest of all."""
    return min(low for low, _ in values), max(high for _, high in values)


def needs_range(values: Sequence[tuple[float, float]], number: int = 0) -> bool:
    """Whether 8 bits would lose the values of these images of 16 bits: all are within `NARROW`, or nine in
    ten images are below it, of these or of the `number` that are to be read."""
    low, high = span(values)
    bright = sum(high >= NARROW for _, high in values)
    return high - low < NARROW or 10 * bright <= max(len(values), number)


def lost_values(values: Values) -> Values:
    """Those of these values that 8 bits would lose, of 16 bits without images that are brighter."""
    lost = {kind: found for kind, found in values.items() if kind != "uint16" or needs_range(found)}
    low, high = span(lost.get("uint16", [(0, 0)]))
    if high - low >= NARROW:
        lost["uint16"] = [pair for pair in lost["uint16"] if pair[1] < NARROW]
    return lost


def needed_range(values: Values) -> tuple[float, float] | None:
    """The range to read images with these values by, if they need one."""
    if not (lost := lost_values(values)):
        return None
    low, high = span([pair for found in lost.values() for pair in found])
    if "uint16" in lost and (deepest := span(lost["uint16"])[1]) < NARROW:
        low, high = min(low, 0), max(high, (1 << int(deepest).bit_length()) - 1)  # all ones in the bits used
    return low, high if low < high else low + 1


def range_fault(values: Values) -> str | None:
    """What is wrong with reading images with these values without --value_range, or None."""
    if not (value_range := needed_range(values)):
        return None
    shown = []
    for kind, found in (values | lost_values(values)).items():
        count = f"{len(found)} of {len(values[kind])}" if len(found) < len(values[kind]) else f"{len(found)}"
        shown.append("{} images of {} hold {:.6g} to {:.6g}".format(count, kind, *span(found)))
    hint = "--value_range {:.6g} {:.6g} makes these black and white".format(*value_range)
    return f"{' and '.join(shown)}, which as 8 bits would be lost: {hint}"


def narrow_note(values: Values) -> str | None:
    """What to tell of images of 16 bits, if 8 bits would lose the values of some, but the set needs no range;
    None if there are none."""
    found = values.get("uint16", [])
    narrow = [(low, high) for low, high in found if high - low < NARROW]
    if not narrow or needs_range(found):
        return None
    hold = "{} of {} images of uint16 that were looked at hold {:.6g} to {:.6g}".format(
        len(narrow), len(found), *span(narrow)
    )
    return f"{hold}, and are nearly of one grey for the network, as the others are not: see --value_range"
