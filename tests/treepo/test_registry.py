import pickle

import pytest

from treepo.base.registry import Registry, load_object


@pytest.fixture
def colours():
    registry = Registry("colour")
    registry.register("red")(1)
    registry.register("green")(2)
    return registry


def test_a_registered_name_gives_its_entry(colours):
    assert colours.get("red") == 1 and colours.names() == ["green", "red"] and "red" in colours


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(colours):
    with pytest.raises(ValueError, match="unknown colour 'gren'.*Did you mean 'green'.*green, red"):
        colours.get("gren")


def test_the_same_name_twice_is_a_programming_error(colours):
    with pytest.raises(AssertionError, match="twice"):
        colours.register("red")(3)


def test_user_code_is_found_by_module_and_by_file(colours, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Blue:\n    pass\n\ndef make():\n    return 7\n")
    assert colours.get(f"{file}:make")() == 7
    assert colours.get("math:sqrt")(9) == 3
    blue = load_object(f"{file}:Blue")
    assert load_object(f"{file}:Blue") is blue  # one module a file
    assert isinstance(pickle.loads(pickle.dumps(blue())), blue)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:f", "does not exist"),
        ("no_such_module_at_all:f", "no module of that name"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:", "expected 'module:function'"),
    ],
)
def test_user_code_that_cannot_be_found_says_why(colours, spec, message):
    with pytest.raises(ValueError, match=message):
        colours.get(spec)


def test_a_check_looks_at_the_form_and_the_file_of_user_code_and_imports_nothing(colours, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    colours.check(f"{file}:f")
    colours.check("no_such_module_at_all:f")
    with pytest.raises(ValueError, match="colour file 'nowhere.py' does not exist"):
        colours.check("nowhere.py:f")
    with pytest.raises(ValueError, match="colour 'nowhere.py:': expected 'module:function'"):
        colours.check("nowhere.py:")


def test_a_word_beside_the_entries_is_allowed_and_listed(colours):
    colours.check("none", besides=["none"])
    with pytest.raises(ValueError, match="Did you mean 'none'.*Known: green, none, red"):
        colours.check("nune", besides=["none"])


def test_a_missing_import_inside_user_code_is_not_hidden(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import surely_not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load_object(f"{file}:f")
    with pytest.raises(ModuleNotFoundError):  # and a second try does not find half a module
        load_object(f"{file}:f")
