import pytest
from hub_server import Repository, hub_server

from hf_compress.export.license import license_of


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit, apache-2.0]\nlicense_name: both\n---\n", {}),
        ("---\nlanguage: en\n---\n", {}),
        ("no metadata", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: mit\nmodel-index: 3\n---\n", {"license": "mit"}),
    ],
)
def test_what_the_card_says(card, expected, tmp_path) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert license_of(str(tmp_path)) == expected


def test_a_model_without_a_card(tmp_path) -> None:
    assert license_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_bytes(b"\xff")
    assert license_of(str(tmp_path)) == {}


def test_a_model_on_the_hub_or_out_of_reach(monkeypatch, tmp_path) -> None:
    with hub_server() as hub:
        hub.use(monkeypatch)
        repository = hub.repositories.setdefault("tester/base", Repository())
        repository.add("main", "card", {"README.md": b"---\nlicense: mit\n---\n"})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert license_of("tester/base") == {"license": "mit"}
        assert license_of("tester/unknown") == {}
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert license_of("tester/other") == {}
