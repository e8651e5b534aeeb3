"""A page of what ``benchmarks.serving`` measured, and what 10,000 annotators would need by it.

    python -m benchmarks.serving_report serving.json --output serving.md

The page is of Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ANNOTATORS = 10_000
# Of one annotator.
SECONDS_A_CLICK = 3.0
SECONDS_AN_IMAGE = 60.0


def page(results: dict[str, Any]) -> str:
    """Markdown; of sections that were not measured there is nothing."""
    machine, model = results["machine"], results["model"]
    parts = [
        "# Serving",
        f"{machine['processor']}, {machine['cores']} cores; {model['name']}, {model['precision']}, "
        f"{model['threads']} thread an operator, {model['workers']} workers; an image of "
        f"{results['image'][1]} x {results['image'][0]} pixels.",
        f"```sh\n{results['command']}\n```",
    ]
    if runs := results.get("runs"):
        ways = list(dict.fromkeys(run["way"] for run in runs))
        users = sorted({run["users"] for run in runs})
        found = {(run["way"], run["users"]): run for run in runs}
        parts += [
            "Clicks a second:",
            table(
                ["users", *ways],
                [
                    [n, *(found.get((w, n), {}).get("clicks_a_second", "") for w in ways)]
                    for n in users
                ],
            ),
            "Latency, p50 / p95 / p99 in ms:",
            table(
                ["users", *ways], [[n, *(latency(found.get((w, n))) for w in ways)] for n in users]
            ),
        ]
    if overhead := results.get("overhead"):
        names = {
            "way": "way",
            "image": "image",
            "masks": "masks",
            "predict_p50_ms": "`predict`, ms",
            "served_p50_ms": "served, ms",
            "overhead_p50_ms": "more, p50, ms",
            "overhead_p25_ms": "more, p25, ms",
            "overhead_processor_ms": "more processor time, ms",
        }
        rows = [
            [size(row[n]) if n == "image" else row.get(n, "") for n in names] for row in overhead
        ]
        parts += [
            "One user's click beside a plain call, in turn:",
            table(list(names.values()), rows),
        ]
    for soak in results.get("soak", ()):
        parts.append(
            f"Soak: {soak['images']} images, {soak['clicks']} clicks in {soak['seconds']} s; the "
            f"server's memory {soak['resident_mb_after_a_third']} MB after a third and "
            f"{soak['resident_mb_at_the_end']} MB at the end, {soak['mb_per_1000_clicks']} MB per "
            f"1,000 clicks."
        )
    if hostile := results.get("hostile"):
        rows = [
            [row["callers"], row["clicks"], latency(row), row["errors"], row["resident_mb"]]
            for row in hostile
        ]
        heads = ["other callers", "clicks", "p50 / p95 / p99, ms", "errors", "memory, MB"]
        parts += ["One user among hostile callers:", table(heads, rows)]
    if costs := results.get("costs"):
        parts += [
            f"What {ANNOTATORS:,} annotators need, each with a click every {SECONDS_A_CLICK:g} s "
            f"and an image every {SECONDS_AN_IMAGE:g} s, all of 1920 x 1080 pixels, nothing left "
            "over for peaks:",
            table(["what", "one", "all"], need(costs[0], overhead or [])),
        ]
    return "\n\n".join(parts) + "\n"


def need(costs: dict[str, Any], overhead: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of what, for one and for all of the annotators.

    Args:
        costs: of one image and one click.
        overhead: rows, of which the one over HTTP with the most pixels and masks is taken.
    """
    clicks, images = ANNOTATORS / SECONDS_A_CLICK, ANNOTATORS / SECONDS_AN_IMAGE
    counted = [row for row in overhead if "overhead_processor_ms" in row]
    largest = max(counted, key=lambda row: (row["image"], row["masks"]), default={})
    http = largest.get("overhead_processor_ms", 0.0)
    click, encode = costs["click_processor_ms"] + http, costs["encode_processor_ms"]
    embedding, answer, image = (costs[f"{n}_bytes"] for n in ("embedding", "answer", "image"))
    return [
        ["cores for clicks", f"{click:.0f} ms", f"{clicks * click / 1e3:,.0f}"],
        ["cores for images", f"{encode:,.0f} ms", f"{images * encode / 1e3:,.0f}"],
        [
            "memory for embeddings",
            f"{embedding / 1e6:.1f} MB",
            f"{ANNOTATORS * embedding / 1e9:,.0f} GB",
        ],
        ["masks out", f"{answer / 1e3:.0f} kB", f"{clicks * answer / 1e6:,.0f} MB/s"],
        ["images in", f"{image / 1e3:.0f} kB", f"{images * image / 1e6:,.0f} MB/s"],
    ]


def latency(run: dict[str, Any] | None) -> str:
    """Percentiles of a run, or nothing."""
    return " / ".join(f"{run[f'p{p}_ms']:.0f}" for p in (50, 95, 99)) if run else ""


def size(shape: list[int]) -> str:
    """Width x height."""
    return f"{shape[1]} x {shape[0]}"


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    """Read the figures, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="what benchmarks.serving wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    options.output.write_text(page(json.loads(options.results.read_text())))


if __name__ == "__main__":
    main()
