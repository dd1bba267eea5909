"""The command that generates text by iterative unmasking."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.options import Json, ModelPath, check_utf8, delayed_progress, open_display, open_model, print_json

if TYPE_CHECKING:
    from unmask.models.generate import Generation
    from unmask.models.model import Model

GENERATE_EXAMPLES = """\
[bold]Examples[/bold]

unmask generate runs/demo "Return the" --length 12
unmask generate runs/demo "The first" --suffix "the last." --length 8 --num 5 --temperature 0.7
unmask generate runs/demo --order gibbs --sweeps 4 --show-steps
"""
_STYLES = {"given": "dim", "set": "", "new": "bold green", "mask": "dim"}


def generate_text(
    model: ModelPath,
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Text before the generated tokens.")] = "",
    suffix: Annotated[str, typer.Option(help="Text after the generated tokens.", show_default="none")] = "",
    length: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 20,
    order: Annotated[
        Literal["confidence", "random", "gibbs", "left-to-right"] | None,
        typer.Option(
            help="Order of the positions: confidence samples all masks and sets the most probable tokens, random sets "
            "any, gibbs then masks each position again and resamples it, left-to-right follows the text: the only one "
            "of a causal model.",
            show_default="confidence; left-to-right for a causal model",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps of a pass over all masks.", show_default="one per token")
    ] = None,
    schedule: Annotated[
        Literal["cosine", "linear"],
        typer.Option(help="Number of tokens left masked after each step: cosine sets few at first."),
    ] = "cosine",
    sweeps: Annotated[
        int | None, typer.Option(help="Number of passes that resample all tokens, in order gibbs.", show_default="1")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Divisor of the logits: below 1, probable tokens become more probable.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the K most probable tokens only.", metavar="K", show_default="all")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the most probable tokens that add up to probability P.", metavar="P"),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    num: Annotated[int, typer.Option(help="Number of texts to generate.")] = 1,
    show_steps: Annotated[
        bool, typer.Option("--show-steps", help="Print the text after each step.", show_default=False)
    ] = False,
    as_json: Json = False,
) -> None:
    r"""Generate text after a prefix, or between a prefix and a suffix, by replacing \[MASK] tokens step by step.

    Special tokens are never generated. In a pipe, each text is one line. The log-probability of a text adds up those of
    its tokens, each at the step that set it.
    """
    from unmask.models.generate import generate

    loaded = open_model(model)
    with open_display(sys.stderr) as display:
        generations = generate(
            loaded,
            check_utf8(prefix),
            check_utf8(suffix),
            length=length,
            num=num,
            seed=seed,
            on_progress=delayed_progress(display),
            order=order,
            steps=steps,
            schedule=schedule,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            sweeps=sweeps,
        )
    if as_json:
        print_json([asdict(generation) for generation in generations])
    else:
        _print_generations(loaded, generations, show_steps=show_steps)


def _print_generations(model: Model, generations: Sequence[Generation], *, show_steps: bool) -> None:
    """Print texts: with log-probabilities and colors in a terminal, one per line in a pipe."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible

    console = Console(highlight=False, soft_wrap=True)
    for number, generation in enumerate(generations, start=1):
        if console.is_terminal:
            per_token = generation.log_probability / len(generation.ids)
            facts = f"log-probability {generation.log_probability:.2f}, {per_token:.2f} per token"
            console.print(Text(f"{number}/{len(generations)}  {facts}" if len(generations) > 1 else facts, "dim"))
        if show_steps:
            _print_steps(model, generation)
        console.print(visible(generation.text), markup=False)


def _print_steps(model: Model, generation: Generation) -> None:
    """Print the text after each step; new tokens are green in a terminal."""
    from rich.console import Console
    from rich.text import Text

    from unmask.core.format import visible
    from unmask.models.generate import segments

    console = Console(highlight=False, soft_wrap=True)
    width = len(str(len(generation.steps)))
    for number, parts in enumerate(segments(model, generation), start=1):
        shown = [(visible(part.text), _STYLES[part.state]) for part in parts]
        console.print(Text.assemble((f"step {number:>{width}}  ", "dim"), *shown))
