"""The tiny models' folders: complete, the same every time, and with a tokenizer for any bytes."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pals_ray.engine.virtual.tiny_models import CONFIGS, make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_file(str(make_tiny_model("tiny-dense", tmp_path_factory.mktemp("models")) / "tokenizer.json"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.text(max_size=50))
def test_any_text_is_encoded_as_its_bytes_and_decoded_again(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


@given(st.binary(max_size=50))
def test_any_output_decodes_to_valid_text(tokenizer, output):
    assert tokenizer.decode(list(output)) == output.decode(errors="replace")


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_ends_a_request(name, tmp_path):
    folder = make_tiny_model(name, tmp_path)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text())["eos_token_id"] is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_the_same_wherever_it_is_made(name, tmp_path):
    assert contents(make_tiny_model(name, tmp_path / "a")) == contents(make_tiny_model(name, tmp_path / "b"))


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    folder = make_tiny_model("tiny-moe", tmp_path)
    before = folder.stat().st_ino
    assert make_tiny_model("tiny-moe", tmp_path).stat().st_ino == before


def test_a_damaged_folder_is_made_anew(tmp_path):
    folder = make_tiny_model("tiny-moe", tmp_path)
    whole = contents(folder)
    (folder / "config.json").write_text("{")
    assert contents(make_tiny_model("tiny-moe", tmp_path)) == whole


def test_many_replicas_can_make_one_folder_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(make_tiny_model, ["tiny-dense"] * 32, [tmp_path] * 32))
    assert folders == {tmp_path / "tiny-dense"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-dense"]


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(KeyError, match="tiny-huge"):
        make_tiny_model("tiny-huge", tmp_path)
