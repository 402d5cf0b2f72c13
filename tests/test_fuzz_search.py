"""Random storage URLs, studies and search spaces: what is wanted, or the project's own errors.

FUZZ_EXAMPLES=2000 pytest tests/test_fuzz_search.py  # by hand; CI runs a few examples
"""

import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from mnist.search import existing, space, urls
from tests.test_fuzz_pictures import FUZZ, given, st

# --- storage URLs

SECRET = "s3cretWord"
WORDS = st.text(string.ascii_letters + string.digits + "_-.", min_size=1, max_size=8)
MARKS = st.sampled_from(("", *"@:/?#&=%;, ", "%40", "%3F", "é"))
SECRETS = st.builds(lambda before, after: before + SECRET + after, MARKS, MARKS)
SCHEMES = st.sampled_from(("postgresql", "postgres", "postgresql+psycopg", "mysql+pymysql", "x"))
PARAMETERS = st.sampled_from(("password", "pwd", "sslkey", "options", "PASSWORD", "token"))


@FUZZ
@given(SCHEMES, WORDS, SECRETS, WORDS, WORDS)
def test_a_password_is_shown_nowhere(
    scheme: str, user: str, password: str, host: str, name: str
) -> None:
    assert_hidden(f"{scheme}://{user}:{password}@{host}/{name}")


@FUZZ
@given(SCHEMES, WORDS, WORDS, PARAMETERS, SECRETS, st.booleans())
def test_a_parameter_that_may_be_a_secret_is_shown_nowhere(
    scheme: str, host: str, name: str, parameter: str, value: str, first: bool
) -> None:
    query = [f"{parameter}={value}", "connect_timeout=5"]
    query = query if first else query[::-1]
    assert_hidden(f"{scheme}://{host}/{name}?{'&'.join(query)}")
    assert_hidden(f"sqlite:///file:{name}?uri=true&{'&'.join(query)}")


def assert_hidden(url: str) -> None:
    """Neither output, nor records, nor errors have the secret."""
    shown = urls.mask_url_secrets(url)
    assert SECRET not in shown, shown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls, "is_in_memory", lambda _: True)
        with pytest.raises(urls.StudyError) as refused:
            urls.check(url)
    assert SECRET not in str(refused.value), refused.value
    assert "\n" not in str(refused.value)


# --- studies and trials of others

VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-5, 500), st.floats(width=32), st.text(max_size=5)),
    *(st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers())),
)
NAMES = st.one_of(st.sampled_from([*space.DEFAULT, *existing.ATTRIBUTES]), st.text(max_size=8))


@FUZZ
@given(st.dictionaries(NAMES, VALUES, max_size=3), st.sampled_from(["minimize", "maximize"]))
def test_a_study_of_others_is_continued_or_refused_in_one_line(
    attributes: Mapping[str, Any], direction: str
) -> None:
    study = optuna.create_study(study_name="study", direction=direction)
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    line = ""
    try:
        existing.check(study)
        assert direction == "maximize"
    except urls.StudyError as error:
        line = f"{error}"
    assert not line or "start another one with --study study-2" in line
    assert "\n" not in line


@FUZZ
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_an_enqueued_trial_is_within_the_space_or_fails_with_a_reason(
    params: Mapping[str, Any],
) -> None:
    study = optuna.create_study()
    study.enqueue_trial(dict(params))
    rejected = existing.reject_trials(study, study.trials, space.DEFAULT)
    (trial,) = study.trials
    assert (trial.state == TrialState.FAIL) == rejected
    assert ("fail_reason" in trial.user_attrs) == rejected
    if not rejected:
        suggested = study.ask(space.DEFAULT).params
        assert {key: suggested[key] for key in params} == params


# --- files of search spaces

TOML_VALUES = st.one_of(
    *(WORDS.map(repr), st.integers(-9, 9).map(str), st.floats(width=32).map(str)),
    *(st.sampled_from(("true", "[]", '["Adam"]', "[0, 1]", '"log:1e-5:1"', '"int:1:9"', "{}")),),
)
LINES = st.one_of(
    st.builds(
        "{} = {}".format, st.sampled_from(("lr", "batch_size", "optimizer", "x")), TOML_VALUES
    ),
    st.sampled_from(("[space]", "[[lr]]", "# a comment", '"', "\ufeff", "lr.low = 1", "\0")),
)


@FUZZ
@given(st.lists(LINES, max_size=5), st.sampled_from(["utf-8", "utf-16", "latin-1"]))
def test_a_file_of_a_space_is_read_or_refused_in_one_line(lines: list[str], encoding: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.toml"
        path.write_bytes("\n".join(lines).encode(encoding, "replace"))
        line = ""
        try:
            optuna.create_study().ask(space.read_space(str(path), ()))
        except space.SpaceError as error:
            line = f"{error}"
        assert "\n" not in line
