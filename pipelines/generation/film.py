"""Animation of the first samples over the autoregressive steps."""

import io

from PIL import Image

MILLISECONDS = 4000  # duration of all steps; the last frame is shown for LAST
SHORTEST, LONGEST, LAST = 40, 400, 2000


def animation(frames: list[Image.Image]) -> bytes:
    """Frames as an endlessly looping WebP."""
    each = min(max(MILLISECONDS // len(frames), SHORTEST), LONGEST)
    buffer = io.BytesIO()
    durations = [each] * (len(frames) - 1) + [LAST]
    frames[0].save(buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80)
    return buffer.getvalue()
