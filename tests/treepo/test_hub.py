"""Models by name come from the Hub, or from its cache on this machine."""

import shutil

import pytest

from treepo.hub import local_model


def test_a_folder_is_itself(tiny_model_path):
    assert local_model(str(tiny_model_path)) == str(tiny_model_path)


def test_a_name_in_the_cache_is_found_without_a_network(tmp_path, tiny_model_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model_path, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_model("someone/tiny") == str(repository / "snapshots" / commit)


@pytest.mark.parametrize("name", ["someone/absent", "not a name"])
def test_a_name_that_gives_nothing_is_one_clear_error(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no folder here, and the Hugging Face Hub gave no model"):
        local_model(name)
