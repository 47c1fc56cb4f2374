"""The service's settings: categories from a file, over the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from covey.config import ConfigError, load
from covey.policy.reuse import ReuseMode
from services.semcache.config import Config


def from_toml(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "covey.toml"
    file.write_text(text)
    return load(Config, file=file, tables=("common", "semcache")).config


def test_a_category_is_added_and_a_default_one_changed(tmp_path: Path) -> None:
    config = from_toml(
        tmp_path,
        """
        [semcache.categories.faq]
        mode = "semantic"
        tau = 0.9
        [semcache.categories.support]
        ttl_s = 60
        quota_entries = 5
        guard = false
        examples = ["My order is late"]
        """,
    )
    policies = {policy.name: policy for policy in config.policies()}
    assert set(policies) == {"general", "code", "math", "faq", "support"}
    assert (policies["faq"].mode, policies["faq"].tau, policies["faq"].guard) == (ReuseMode.SEMANTIC, 0.9, True)
    assert (policies["support"].mode, policies["support"].ttl_s) == (ReuseMode.EXACT, 60)
    assert (policies["support"].quota_entries, policies["support"].guard) == (5, False)
    assert config.examples() == {"support": ("My order is late",)}


def test_defaults_reuse_nothing_semantically() -> None:
    assert all(policy.mode is not ReuseMode.SEMANTIC for policy in Config().policies())
    assert Config().examples() == {}


@pytest.mark.parametrize(
    "text",
    [
        "[semcache.categories.x]\ntau = 1.5",
        "[semcache.categories.x]\nttl_s = 0",
        "[semcache.categories.x]\nquota_entries = -1",
        '[semcache.categories.x]\nmode = "fuzzy"',
        "[semcache.categories.x]\nthreshold = 0.9",
        "[semcache]\nentries_max = 0",
        "[semcache]\nsize_bytes_max = 10",
        "[semcache]\nclassify_floor = 2",
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        from_toml(tmp_path, text)
