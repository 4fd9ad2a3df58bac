"""A typed text is encoded as the corpus was."""

from pathlib import Path
from typing import Any

import pytest

from sae.jobs.lake import Lake, connect
from sae.jobs.typed import SentenceEncoder
from sae.schemas.errors import AutoencoderError, ConfigError
from sae.schemas.site import Encoded, Typed
from tests.tiny_run import CONTEXT_LENGTH, NAME, Lab


@pytest.fixture(scope="module")
def encoder(finished: Lab) -> SentenceEncoder:
    return SentenceEncoder(Lake(str(finished.lake)))


def typed(encoder: SentenceEncoder, text: str) -> Encoded:
    return encoder.encode(Typed(autoencoder=NAME, text=text))


def asked(lab: Lab, sql: str) -> list[tuple[Any, ...]]:
    return connect(str(lab.lake)).sql(sql).fetchall()


def test_atoms_are_those_of_the_table(finished: Lab, encoder: SentenceEncoder) -> None:
    short = asked(
        finished,
        "select external_id, context_id, len(token_ids) from contexts join documents using (corpus, doc_id) "
        f"where n_tokens between 4 and {CONTEXT_LENGTH} order by context_id",
    )
    assert short
    for name, context_id, n_tokens in short:
        answer = typed(encoder, (finished.folder / "texts" / Path(name).name).read_text(encoding="utf-8"))
        assert len(answer.tokens) == n_tokens
        found = {
            (pos, atom): act
            for pos, (atoms, acts) in enumerate(zip(answer.atoms, answer.acts, strict=True))
            for atom, act in zip(atoms, acts, strict=True)
        }
        latents = asked(finished, f"select pos, atom, act from latents where context_id = {context_id}")
        # The table's are rounded to 10 mantissa bits.
        assert found == pytest.approx({(pos, atom): act for pos, atom, act in latents}, rel=1e-3)
        assert all(acts == sorted(acts, reverse=True) for acts in answer.acts)
        assert answer.atoms[0] == [], "position 0 is masked"


def test_a_text_that_is_no_context_is_told(encoder: SentenceEncoder) -> None:
    with pytest.raises(ConfigError, match=rf"text: has [0-9,]+ tokens; expected 1 to {CONTEXT_LENGTH}"):
        typed(encoder, "fox " * 1000)
    with pytest.raises(ConfigError, match=f"autoencoder: no other is loaded; {NAME} are"):
        encoder.encode(Typed(autoencoder="other", text="fox"))


def test_odd_texts_have_tokens(encoder: SentenceEncoder) -> None:
    for text in ("<script>", "\0", "\u202e", "👩‍👩‍👧", "\n\n"):
        answer = typed(encoder, text)
        assert len(answer.tokens) == len(answer.atoms) >= 1


def test_weights_that_are_gone_are_told(finished: Lab, tmp_path: Path) -> None:
    lake = Lake(str(finished.copy(tmp_path).lake))
    with lake.transaction("encode") as transaction:
        known = transaction.base.properties[f"encode/{NAME}"]
        transaction.set(f"encode/{NAME}", {**known, "checkpoint": "0" * 12})
    with pytest.raises(AutoencoderError, match=r"the weights that encoded it \(0+\) are no longer kept"):
        SentenceEncoder(lake)
