"""The columns of the viewer's files are what a browser can read without code of its own."""

import pyarrow as pa
import pytest
from pydantic import ValidationError

from sae.schemas.site import FILES, Dictionary, Entry, Site

IN_JAVASCRIPT = (pa.int32(), pa.float32(), pa.float64(), pa.string())


@pytest.mark.parametrize("name", FILES)
def test_columns_have_types_that_javascript_has(name: str) -> None:
    for field in FILES[name]:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        assert kind in IN_JAVASCRIPT, field


def test_a_site_says_which_autoencoders_it_has() -> None:
    site = Site(autoencoders=[Entry(name="demo", path="demo")])
    assert Site.model_validate_json(site.model_dump_json()) == site
    with pytest.raises(ValidationError, match="path"):
        Site.model_validate_json('{"autoencoders": [{"name": "demo"}]}')


def test_a_dictionary_has_latents() -> None:
    with pytest.raises(ValidationError, match="n_latents"):
        Dictionary.model_validate_json('{"n_latents": 0}')
