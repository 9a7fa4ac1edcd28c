"""A labelled grid of previews: prompts down, checkpoints across."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FAINT = "#1c1c1c", "#fafaf7", "#8a8a86"
CELL_PIXELS = 192
GAP, MARGIN, LABEL_PIXELS = 10, 20, 190
LINE_PIXELS = 20
CUT = "..."

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_grid(
    pictures: Sequence[Sequence[Image.Image]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> Image.Image:
    """The grid as one picture.

    Args:
        pictures: by row, then column, of any sizes. Small ones are enlarged without smoothing.
        rows: label of each row, e.g. its prompt; long ones are wrapped, and cut where the row ends.
            What stands after a line break is whole.
        columns: label of each column, e.g. its step.
        title: a line above.
    """
    shown = [[_enlarged(picture) for picture in line] for line in pictures]
    font, small, bold = (ImageFont.load_default(size) for size in (16, 14, 20))
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(picture.width for picture in column) for column in zip(*shown, strict=True)]
    widths = [
        max(width, round(ruler.textlength(label, font=font)))
        for width, label in zip(widths, columns, strict=True)
    ]
    heights = [max(picture.height for picture in line) for line in shown]
    top = MARGIN + 34 + 28
    left = MARGIN + LABEL_PIXELS
    sheet_width = left + sum(widths) + GAP * (len(widths) - 1) + MARGIN
    sheet = Image.new("RGB", (sheet_width, top + sum(heights) + GAP * len(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    headline = _cut(draw, title, bold, sheet_width - 2 * MARGIN)
    draw.text((MARGIN, MARGIN - 4), headline, fill=INK, font=bold)
    lefts = [left + sum(widths[:x]) + GAP * x for x in range(len(widths))]
    for x, label in zip(lefts, columns, strict=True):
        draw.text((x, top - 24), label, fill=FAINT, font=font)
    for label, line, height in zip(rows, shown, heights, strict=True):
        text = _wrapped(draw, label, small, LABEL_PIXELS - 16, lines=max(1, height // LINE_PIXELS))
        draw.multiline_text((MARGIN, top + 2), text, fill=INK, font=small, spacing=5)
        for x, picture in zip(lefts, line, strict=True):
            sheet.paste(picture, (x, top))
        top += height + GAP
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, round(CELL_PIXELS / max(picture.size)))
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int, *, lines: int) -> str:
    """The text in lines that fit; what finds no room is cut, and shows that it is."""
    text, _, kept = text.partition("\n")
    below = _fitted(draw, kept, font, width) if kept else []
    found, room = _fitted(draw, text, font, width), max(1, lines - len(below))
    if len(found) > room:
        found = [*found[: room - 1], _cut(draw, f"{found[room - 1]} {CUT}", font, width)]
    return "\n".join([*found, *below])


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> list[str]:
    lines = [""]
    for word in (part for long in text.split() for part in _parts(draw, long, font, width)):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _parts(draw: ImageDraw.ImageDraw, word: str, font: _Font, width: int) -> list[str]:
    """A word in pieces that fit into a line; one piece, unless it is longer than a line."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and draw.textlength(pieces[-1] + letter, font=font) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _cut(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    """The text, or as much of it as fits into the width with a sign that more follows."""
    if draw.textlength(text, font=font) <= width:
        return text
    kept = text.removesuffix(CUT).rstrip()
    while kept and draw.textlength(kept + CUT, font=font) > width:
        kept = kept[:-1]
    return kept.rstrip(" ,") + CUT
