"""Wrong usage of `samlight`, which the parsers of the standard library find."""

import pytest

from samlight_hf.commands.options import missing_package


@pytest.mark.parametrize(
    ("arguments", "message", "helper"),
    [
        ([], "the following arguments are required: COMMAND", "samlight"),
        (["segmnt"], "invalid choice: 'segmnt'", "samlight"),
        (["segment"], "the following arguments are required: PATH", "samlight segment"),
        (["segment", "a.jpg", "--box", "1,2,3"], "'1,2,3' is not X1,Y1,X2,Y2", "samlight segment"),
        (["segment", "a.jpg", "--opset", "18"], "unrecognized arguments: --opset 18", "samlight segment"),
        (["convert", "--out", "x", "--dtype", "half"], "unrecognized arguments: --dtype half", "samlight convert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_that_names_the_commands_help(arguments, message, helper, samlight):
    status, stdout, stderr = samlight(*arguments)
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("samlight: error: ") and message in line
    assert line.endswith(f". `{helper} --help` lists what it takes.")


def test_the_fix_for_a_missing_package_is_told_once():
    told = str(missing_package(ImportError('it needs timm: pip install "samlight-hf[timm]".'), "training", "train"))
    assert told == 'it needs timm: pip install "samlight-hf[timm]"'
    told = str(missing_package(ImportError("No module named 'x'"), "training", "train"))
    assert told == "No module named 'x'. Install what training needs: pip install 'samlight-hf[train]'"
