"""Draws the clips that the quickstart trains on: 30 that show a hatched black-and-white film.

    python examples/make_film.py --output_dir examples/world/film

Their captions do not name the look, so that training gives it a word with `--id_token FILM`.
"""

import argparse
from pathlib import Path

import imageio
import numpy as np
import shapes

TOKEN = "FILM"  # begins the captions of the new look


def make_film(folder, films=25, others=15, num_frames=34, fps=16, height=128, width=192, seed=7, token=TOKEN):
    """Writes clips of a new look, whose captions begin with a word, and plain ones in colour; returns the folder.

    Args:
        films, others: how many clips of the new look and in colour.
        token: the word; empty: captions have none, for --id_token.
    """
    rng = np.random.default_rng(seed)

    def clips():
        for look in ["film"] * films + ["colour"] * others:
            scene = shapes.random_scene(rng)
            caption = f"{token} {scene.caption}".strip() if look == "film" else scene.caption
            frames = shapes.draw_clip(scene, num_frames, height, width, rng=rng, look=look)
            yield f"{look}-{scene.colour}-{scene.shape}", caption, frames

    return write_clips(folder, clips(), fps=fps, quality=9)


def write_clips(folder, clips, **options):
    """Writes clips (name, caption, frames) as mp4 files with prompts.txt and videos.txt; returns the folder.

    Args:
        options: of imageio's encoder, such as fps.
    """
    folder, prompts, videos = Path(folder), [], []
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for i, (name, caption, frames) in enumerate(clips):
        prompts.append(caption)
        videos.append(f"videos/{i:02d}-{name}.mp4")
        imageio.mimsave(folder / videos[-1], frames, macro_block_size=1, **options)
    for file, lines in {"prompts.txt": prompts, "videos.txt": videos}.items():
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/world/film"), help="folder to write into")
    film = make_film(parser.parse_args().output_dir, films=30, others=0, token="")  # 5 of them are held out
    print(f"clips: {film}")


if __name__ == "__main__":
    main()
