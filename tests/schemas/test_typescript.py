"""The viewer's types are those of the Python schemas."""

from pathlib import Path

from sae.schemas.site import FILES
from sae.schemas.typescript import MODELS, typescript

SCHEMAS = Path(__file__).parents[2] / "viewer" / "src" / "schemas.ts"


def test_the_viewers_types_are_up_to_date() -> None:
    made = "python -m sae.schemas.typescript > viewer/src/schemas.ts"
    assert SCHEMAS.read_text("utf-8") == typescript(), f"schemas/ changed: {made}"


def test_every_column_and_field_has_a_type() -> None:
    lines = typescript().splitlines()
    for schema in FILES.values():
        assert all(any(line.startswith(f"  {name}: ") for line in lines) for name in schema.names)
    for model in MODELS:
        assert f"export interface {model.__name__} {{" in lines
    assert "  skew: number | null;" in lines
    assert "  hist_bin: number[];" in lines
    assert "  atoms: [number, number];" in lines
    assert "  warning?: string | null;" in lines
    assert "  top_upvote_tokens_probs?: (string[] | null)[] | null;" in lines
    assert "  hist: Record<string, number>;" in lines
