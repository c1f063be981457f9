"""Time of the causal convolution and SiLU as XLA fuses them, against moving their arrays once.

    python benchmarks/causal_conv.py --json conv.json
    python benchmarks/causal_conv.py --shape 1,256,64                    # small, for a CPU

The operator does almost no arithmetic, so its floor is its bytes: x in and y out going forward, and x, the gradient of y and
the gradient of x more going backward. The rate that turns bytes into time is a copy's, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import jax
from harness import machine, repeated, seconds

from pallas_kernels.causal_conv import causal_conv

SHAPES = ("8,2048,2304", "64,2048,2304", "1,65536,2304")
TAPS = 4


def forward(x, weight, bias, dy):
    return jax.nn.silu(causal_conv(x, weight, bias)[0])


def both(x, weight, bias, dy):
    y, pullback = jax.vjp(lambda x, weight, bias: forward(x, weight, bias, dy), x, weight, bias)
    return y, pullback(dy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="B,L,E; may be repeated")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=10, help="calls in one timed program")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for text in options.shape or SHAPES:
        batch, length, channels = map(int, text.split(","))
        keys = jax.random.split(jax.random.key(0), 4)
        x, dy = (jax.random.normal(key, (batch, length, channels)).astype(options.dtype) for key in keys[:2])
        weight, bias = (
            jax.random.normal(key, (n, channels)).astype(options.dtype) for key, n in zip(keys[2:], (TAPS, 1), strict=True)
        )
        arguments = (x, weight, bias[0], dy)
        runs = {
            "copy": repeated(lambda x, weight, bias, dy: x + 1, options.repeat),
            "forward": repeated(forward, options.repeat),
            "forward + backward": repeated(both, options.repeat),
        }
        seconds(runs, arguments, options.repeat, 1)
        times = seconds(runs, arguments, options.repeat, options.rounds)
        copy = statistics.median(times["copy"])
        print(f"{text}, {TAPS} taps, {options.dtype}; a copy takes {copy * 1e3:.3f} ms")
        # A copy moves two arrays; forward as many, and backward three more.
        for name, arrays in (("forward", 2), ("forward + backward", 5)):
            median, floor = statistics.median(times[name]), copy * arrays / 2
            rows.append({"shape": text, "pass": name, "seconds": times[name], "floor": floor})
            spread = f"{min(times[name]) * 1e3:.3f} to {max(times[name]) * 1e3:.3f}"
            print(f"  {name:18} {median * 1e3:8.3f} ms ({spread})  {floor / median:5.1%} of floor")
    if options.json:
        values = {"device": jax.devices()[0].device_kind, "rows": rows, "machine": machine()}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
