"""Encodes and decodes image and wav files with a model that an example trained; see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

from common import codefile
from common.settings import InputError
from common.training import read_checkpoint
from speech import codec as speech
from vqvae import codec as image

CODECS = {"image": image, "speech": speech}  # by the kind that checkpoints and code files name


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="image or wav file -> code file (.npz)")
    encode.add_argument("source", type=Path)
    encode.add_argument("code", type=Path)
    encode.add_argument("--model", type=Path, required=True, help="a checkpoint, such as runs/demo/diveq-seed0.pt")
    encode.add_argument("--t-bits", type=int, default=4, help="SF-DiVeQ: bits for the place on a segment, 0..12")
    encode.add_argument("--stages", type=int, help="speech: how many stages to code with (default: all)")
    decode = commands.add_parser("decode", help="code file -> image or wav file")
    decode.add_argument("code", type=Path)
    decode.add_argument("target", type=Path)
    decode.add_argument("--model", type=Path, help="the checkpoint that encoded it (default: the one the file names)")
    decode.add_argument("--original", type=Path, help="report the quality against this file")
    args = parser.parse_args(arguments)
    if args.command == "encode" and not 0 <= args.t_bits <= 12:
        parser.error(f"--t-bits must be between 0 and 12; got {args.t_bits}")
    return args


def codec_for(kind: str, path: Path) -> ModuleType:
    """The code for a kind of model."""
    if kind not in CODECS:
        raise InputError(f"{path} holds a model of kind {kind!r}, which codes no files")
    return CODECS[kind]


def run(args: argparse.Namespace) -> None:
    if args.command == "encode":
        codec = codec_for(read_checkpoint(args.model)["kind"], args.model)
        told = codec.encode(args.model, args.device, args.source, args.code, args.t_bits, args.stages)
        print(f"{args.code}: {told}")
        return
    content = codefile.read(args.code)
    codec = codec_for(content["kind"], args.code)
    model = args.model or Path(content["model"])
    print(f"{args.target}: {codec.decode(model, args.device, content, args.target, args.original)}")


def main(arguments: list[str] | None = None) -> None:
    try:
        run(parse(arguments))
    except (InputError, OSError) as error:
        sys.exit(f"codec.py: {error}")


if __name__ == "__main__":
    main()
