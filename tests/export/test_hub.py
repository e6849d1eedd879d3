"""What goes to the Hub, what does not, and what happens when it cannot."""

from pathlib import Path

import pytest
import tiny_models
from hub_server import HANG_UP, LOSE, READ_TOKEN, HubServer, hub_server
from uneven_models import files, uneven_bert

from hf_compress import push_to_hub
from hf_compress.errors import ExportError

CARD = '---\nlicense: mit\nlibrary_name: transformers\n---\n\nAutoModel.from_pretrained("path/or/hub-name")\n'
COMMIT = r"POST .*/commit/.*"


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as hub:
        hub.use(monkeypatch)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    uneven_bert().save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text(CARD, encoding="utf-8")
    return tmp_path / "small"


def commits_sent(hub: HubServer) -> int:
    return sum("/commit/" in request for request in hub.requests)


def test_everything_arrives_in_one_commit_and_the_folder_stays(hub, folder) -> None:
    before = files(folder)
    commit = push_to_hub(folder, "small", commit_message="the first one")
    (made,) = hub.commits("tester/small")
    assert (made.title, made.oid) == ("the first one", commit.oid)
    assert commit == f"{hub.url}/tester/small/commit/{commit.oid}"
    assert files(folder) == before
    sent = hub.files("tester/small")
    assert {name: sent[name] for name in before if name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }
    assert b'from_pretrained("tester/small")' in sent["README.md"]


def test_the_default_message_names_the_folder(hub, folder) -> None:
    push_to_hub(folder, "small")
    assert hub.commits("tester/small")[-1].title == "Upload small"


def test_pushing_again_changes_nothing(hub, folder) -> None:
    first = push_to_hub(folder, "tester/small")
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    second = push_to_hub(folder, "tester/small")
    assert second.oid == first.oid
    assert len(hub.commits("tester/small")) == commits_sent(hub) == 1
    assert [request for request in hub.requests if request.startswith("PUT")] == uploads
    (folder / "README.md").write_text(CARD + "more\n", encoding="utf-8")
    push_to_hub(folder, "tester/small")
    assert len(hub.commits("tester/small")) == 2
    assert [request for request in hub.requests if request.startswith("PUT")] == uploads


def test_a_branch_is_made_and_named_in_the_card(hub, folder) -> None:
    push_to_hub(folder, "small", revision="int8/first")
    assert hub.commits("tester/small") == []
    assert b'("tester/small", revision="int8/first")' in hub.files("tester/small", "int8/first")["README.md"]
    push_to_hub(folder, "small", revision="int8/first")
    assert len(hub.commits("tester/small", "int8/first")) == 1


def test_a_pull_request_leaves_the_branch_alone(hub, folder) -> None:
    push_to_hub(folder, "small")
    tiny_models.bert(num_hidden_layers=1).save_pretrained(folder)
    commit = push_to_hub(folder, "small", create_pr=True)
    assert commit.pr_url == f"{hub.url}/tester/small/discussions/1"
    assert len(hub.commits("tester/small")) == 1
    proposed = hub.files("tester/small", "refs/pr/1")
    assert proposed["config.json"] == (folder / "config.json").read_bytes()


def test_a_pull_request_to_somebody_elses_model(hub, folder) -> None:
    push_to_hub(folder, "small")
    hub.repositories["other/small"] = hub.repositories.pop("tester/small")
    (folder / "README.md").write_text(CARD + "better\n", encoding="utf-8")
    assert push_to_hub(folder, "other/small", create_pr=True).pr_num == 1
    assert push_to_hub(folder, "other/small", create_pr=True, revision="main").pr_num == 2
    with pytest.raises(ExportError, match=r"may not write there.*hf-compress push .*small other/small"):
        push_to_hub(folder, "other/small")


def test_weights_of_an_earlier_model_go(hub, folder) -> None:
    """Transformers would load ``model.safetensors`` and not look at the new shards."""
    push_to_hub(folder, "small")
    for path in folder.iterdir():
        path.unlink()
    uneven_bert().save_pretrained(folder, max_shard_size="20KB")
    push_to_hub(folder, "small")
    weights = {name for name in hub.files("tester/small") if name.endswith(".safetensors")}
    assert weights == {path.name for path in folder.glob("model-*.safetensors")}
    assert commits_sent(hub) == 2
    assert "README.md" in hub.files("tester/small")


def test_what_is_not_part_of_a_model_stays_behind(hub, folder) -> None:
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "passwords.txt").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"not uploaded, as not known to belong to a model: passwords\.txt\."):
        push_to_hub(folder, "small")
    assert set(hub.files("tester/small")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}


def test_private_is_what_was_asked_for_or_an_error(hub, folder) -> None:
    push_to_hub(folder, "hidden", private=True)
    push_to_hub(folder, "open")
    assert (hub.repositories["tester/hidden"].private, hub.repositories["tester/open"].private) == (True, False)
    push_to_hub(folder, "hidden")
    sent = commits_sent(hub)
    for name, private in (("hidden", False), ("open", True)):
        (folder / "README.md").write_text(CARD + name, encoding="utf-8")
        with pytest.raises(ExportError, match=rf"private: got {private}, but tester/{name} exists"):
            push_to_hub(folder, name, private=private)
    assert commits_sent(hub) == sent


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", r"401.*hf auth login"), (READ_TOKEN, r"403.*token with write permission")],
)
def test_a_token_that_may_not_write(hub, folder, token, message) -> None:
    with pytest.raises(ExportError, match=message):
        push_to_hub(folder, "small", token=token)
    assert hub.repositories == {}


@pytest.mark.parametrize("status", [500, HANG_UP])
def test_a_failure_in_the_middle_says_how_to_go_on(hub, folder, status) -> None:
    before = files(folder)
    hub.faults.append((COMMIT, status))
    with pytest.raises(ExportError, match=r"The folder is unchanged.*Try again: hf-compress push (\S+)") as caught:
        push_to_hub(folder, "tester/small", revision="x", private=True)
    assert str(caught.value).endswith(f"hf-compress push {folder} tester/small --private --revision x")
    assert files(folder) == before
    assert hub.commits("tester/small", "x") == []
    push_to_hub(folder, "tester/small", revision="x", private=True)
    assert set(hub.files("tester/small", "x")) >= set(before)


def test_an_answer_that_got_lost_makes_no_second_commit(hub, folder) -> None:
    hub.faults.append((COMMIT, LOSE))
    with pytest.raises(ExportError, match=r"it is not known whether it was uploaded to small.*Try again"):
        push_to_hub(folder, "small")
    commit = push_to_hub(folder, "small")
    assert [made.oid for made in hub.commits("tester/small")] == [commit.oid]


@pytest.mark.parametrize(
    ("status", "reason"),
    [(409, r"an answer of the Hub has another form than expected \(KeyError: 'url'\)"), (500, "500")],
)
def test_a_repository_that_cannot_be_made(hub, folder, status, reason) -> None:
    hub.faults.append((r"POST /api/repos/create", status))
    with pytest.raises(ExportError, match=rf"was not uploaded to small: .*{reason}.*Try again"):
        push_to_hub(folder, "small")


def test_a_storage_that_fails_once_is_tried_again(hub, folder) -> None:
    hub.faults.append((r"PUT .*", 500))
    push_to_hub(folder, "small")
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    assert hub.files("tester/small")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_offline_and_unreachable(hub, folder, monkeypatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"refused.*Try again"):
        push_to_hub(folder, "small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="Unset HF_HUB_OFFLINE"):
        push_to_hub(folder, "small")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "a/b/c"}, "repo_id: got 'a/b/c'"),
        ({"repo_id": "../small"}, "repo_id"),
        ({"repo_id": ""}, "repo_id: got ''"),
        ({"repo_id": None}, "repo_id: got None"),
        ({"revision": "refs/heads/x"}, "revision: got 'refs/heads/x'"),
        ({"revision": "a..b"}, "revision"),
        ({"revision": "a b"}, "revision"),
        ({"revision": ".hidden"}, "revision"),
        ({"revision": "x.lock"}, "revision"),
        ({"revision": "0" * 40}, "A commit cannot be changed"),
        ({"commit_message": " "}, "commit_message"),
    ],
)
def test_names_are_checked_before_anything_is_sent(hub, folder, arguments, message) -> None:
    with pytest.raises(ExportError, match=message):
        push_to_hub(folder, **{"repo_id": "small", **arguments})
    assert hub.requests == []


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n---\n",
        b"---\n- a list\n---\n",
        b"---\nmodel-index:\n- results: 3\n---\n",
        b"\xff\xfe not utf-8",
    ],
)
def test_a_broken_card_is_found_before_anything_is_sent(hub, folder, card) -> None:
    (folder / "README.md").write_bytes(card)
    with pytest.raises(ExportError, match=r"README\.md: the card's metadata is not valid.*hf-compress card"):
        push_to_hub(folder, "small")
    assert hub.requests == []


def test_what_the_hub_says_about_the_metadata_comes_before_the_repository(hub, folder) -> None:
    (folder / "README.md").write_text("---\nlicense: mine-alone\n---\n", encoding="utf-8")
    with pytest.raises(ExportError, match=r'refuses the metadata.*"license" must be one of'):
        push_to_hub(folder, "small")
    assert hub.repositories == {}
