"""Encodes and decodes image files with a model that train_vqvae.py trained; see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vqvae import codec, data
from vqvae.config import InputError
from vqvae.evaluate import psnr
from vqvae.train import Run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="image file -> code file (.npz)")
    encode.add_argument("image", type=Path)
    encode.add_argument("code", type=Path)
    encode.add_argument("--model", type=Path, required=True, help="a checkpoint, such as runs/demo/diveq-seed0.pt")
    encode.add_argument("--t-bits", type=int, default=4, help="SF-DiVeQ: bits for the place on a segment, 0..12")
    decode = commands.add_parser("decode", help="code file -> image file")
    decode.add_argument("code", type=Path)
    decode.add_argument("image", type=Path)
    decode.add_argument("--model", type=Path, help="the checkpoint that encoded it (default: the one the file names)")
    decode.add_argument("--original", type=Path, help="report the PSNR against this image file")
    args = parser.parse_args(arguments)
    if args.command == "encode" and not 0 <= args.t_bits <= 12:
        parser.error(f"--t-bits must be between 0 and 12; got {args.t_bits}")
    return args


def run(args: argparse.Namespace) -> None:
    if args.command == "encode":
        image = data.read_image(args.image)
        measures = codec.encode(Run.load(args.model, args.device), image, args.code, args.model, args.t_bits)
        print(f"{args.code}: {measures['bits_per_pixel']:.4f} bits per pixel of codes", end=" ")
        print(f"({measures['file_bits_per_pixel']:.4f} with the file's own overhead), PSNR {measures['psnr']:.2f} dB")
        return
    content = codec.read(args.code)
    image = codec.decode(Run.load(args.model or Path(content["model"]), args.device), content)
    data.write_image(args.image, image)
    print(f"{args.image}: {image.shape[2]} x {image.shape[1]} pixels", end="")
    if args.original:
        original = data.read_image(args.original)
        if original.shape != image.shape:
            raise InputError(f"{args.original} has another size than the decoded image")
        print(f", PSNR {psnr(original, image):.2f} dB", end="")
    print()


def main(arguments: list[str] | None = None) -> None:
    try:
        run(parse(arguments))
    except (InputError, OSError) as error:
        sys.exit(f"codec.py: {error}")


if __name__ == "__main__":
    main()
