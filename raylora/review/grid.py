"""A labelled grid of previews: prompts down, checkpoints across."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, FAINT = "#1c1c1c", "#fafaf7", "#8a8a86"
CELL_PIXELS = 192
GAP, MARGIN, LABEL_LINES = 10, 20, 3


def draw_grid(
    pictures: Sequence[Sequence[Image.Image]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> Image.Image:
    """The grid as one picture.

    Args:
        pictures: by row, then column; of one size. Small ones are enlarged without smoothing.
        rows: label of each row, e.g. its prompt; long ones are wrapped.
        columns: label of each column, e.g. its step.
        title: a line above.
    """
    width, height = pictures[0][0].size
    factor = max(1, round(CELL_PIXELS / max(width, height)))
    cell_w, cell_h = width * factor, height * factor
    font, small, bold = (ImageFont.load_default(size) for size in (16, 14, 20))
    label_w = 190
    top = MARGIN + 34 + 28
    sheet = Image.new(
        "RGB",
        (
            MARGIN * 2 + label_w + len(columns) * (cell_w + GAP),
            top + len(rows) * (cell_h + GAP) + MARGIN,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), title, fill=INK, font=bold)
    for x, label in enumerate(columns):
        left = MARGIN + label_w + x * (cell_w + GAP)
        draw.text((left, top - 24), label, fill=FAINT, font=font)
    for y, (label, line) in enumerate(zip(rows, pictures, strict=True)):
        upper = top + y * (cell_h + GAP)
        text = _wrapped(draw, label, small, label_w - 16)
        draw.multiline_text((MARGIN, upper + 4), text, fill=INK, font=small, spacing=5)
        for x, picture in enumerate(line):
            enlarged = picture.resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + label_w + x * (cell_w + GAP), upper))
    return sheet


def _wrapped(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    width: int,
) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
