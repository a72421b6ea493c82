"""A Spark or a stick that lies: nothing leaves the bundle's folder in either direction."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible_collections.sparkfleet.dgx.plugins.module_utils.sparkfleet_host.job import Job
from hypothesis import given
from hypothesis import strategies as st
from plugins.modules import bundle_collect, bundle_receive
from sparkfleet_host import bounded
from sparkfleet_host.bounded import BoundsError

from sparkfleet import SparkfleetError
from sparkfleet.packaging.bundle import Bundle, Collected, Entry
from sparkfleet.planning.target import Settings, Target
from tests.unit.packaging.test_bundle import BLOB, CONTENT, IMAGE, REPO, SHA, SYSTEM, WEIGHTS, collected, fill, params
from tests.unit.packaging.test_signature import make, signers
from tests.unit.plugins.test_fleet_actions import Stage

MODEL = f"{REPO}@main"
INSPECTION = {
    "plan": {"fetches": [{"image": IMAGE, "repo": REPO, "revision": "main"}]},
    "state": {"os": SYSTEM},
}


class Wire:
    """A connection to a Spark that is a folder of this host."""

    def __init__(self, transport: str = "ssh") -> None:
        self.transport, self.sent, self.endless = transport, [], ""
        self.fetched: list[str] = []
        self._shell, self.has_pipelining = SimpleNamespace(tmpdir=None), True

    def fetch_file(self, path: str, place: str) -> None:
        self.fetched.append(path)
        if path == self.endless:
            try:
                with Path(place).open("wb") as file:
                    for _ in range(1 << 12):
                        file.write(bytes(1 << 20))
            except OSError as error:
                raise AnsibleError(str(error)) from error
        else:
            shutil.copyfile(path, place)

    def put_file(self, path: str, place: str) -> None:
        self.sent.append(path)
        shutil.copyfile(path, place)

    def get_option(self, name: str) -> str:
        return ""


class Runs:
    """The action, with the module run in this process on a folder that stands for the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
        self.stage = Stage(monkeypatch, "bundle")
        self.wire, self.host = Wire(), host
        monkeypatch.setattr(bundle_receive, "let_apt_know", lambda folder: None)

    def __call__(self, state: str, digest: str = "", trust: tuple[str, str] = ("", ""), **given: Any) -> dict[str, Any]:
        """`trust`: the key that signs, and the file of those who may."""
        plugin = object.__new__(self.stage.action.ActionModule)
        plugin._task = SimpleNamespace(
            args={"state": state, **given}, check_mode=False, async_val=0, diff=False, action="x"
        )
        plugin._connection = self.wire
        plugin._early_needs_tmp_path = lambda: False
        plugin._templar = SimpleNamespace(template=lambda value: value)

        def execute(module_name: str, module_args: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
            try:
                return dict(bundle_receive.receive(params(**module_args), self.host))
            except bundle_receive.JobError as error:
                return {"failed": True, "msg": str(error), "failure": error.id}

        plugin._execute_module = execute
        known = {"inventory_hostname": "s1", "sparkfleet_inspection": INSPECTION, "sparkfleet_bundle_digest": digest}
        known.update(zip(("sparkfleet_bundle_key", "sparkfleet_bundle_signers"), trust, strict=True))
        found: dict[str, Any] = plugin.run(task_vars=known)
        return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    return Runs(monkeypatch, tmp_path / "host")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# -- from a Spark ----------------------------------------------------------------------------------------------------


def test_a_bundle_is_made_kept_and_carried_in(run: Runs, tmp_path: Path) -> None:
    carry, spark = tmp_path / "carry", collected(tmp_path / "spark")
    assert run("fetch", bundle=str(carry), collected=spark)["changed"] is True
    assert len(run.wire.fetched) == len(CONTENT)
    assert run("fetch", bundle=str(carry), collected=spark)["changed"] is False
    (carry / "bundle.json").unlink()  # cut before it was noted
    assert run("fetch", bundle=str(carry), collected=spark)["changed"] is True
    assert len(run.wire.fetched) == len(CONTENT)  # nothing travelled again
    assert [name for name in files(carry) if "incomplete" in name] == []
    run("push", bundle=str(carry), images=[IMAGE], models=[{"repo": REPO, "revision": "main"}], packages=True)
    assert (run.host / BLOB).read_bytes() == WEIGHTS
    assert json.loads((run.host / "hub/.sparkfleet/models--org--model/fetching.json").read_text())["repo"] == REPO
    sent = len(run.wire.sent)
    run("push", bundle=str(carry), images=[IMAGE], models=[{"repo": REPO, "revision": "main"}], packages=True)
    assert len(run.wire.sent) == sent == len(CONTENT)


def item(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda given: given["files"].append({"path": "/etc/hostname", "size": 1, "sha256": "0" * 64, **change})


def change(*path: Any) -> Callable[[dict[str, Any]], None]:
    def apply(given: dict[str, Any]) -> None:
        at: Any = given
        for key in path[:-2]:
            at = at[key]
        at[path[-2]] = path[-1]

    return apply


@pytest.mark.parametrize(
    "lie",
    [
        item(name="../../home/.ssh/authorized_keys"),
        item(name="/etc/cron.d/evil"),
        item(name="packages/../../evil.deb"),
        item(name="packages/.bashrc"),
        item(name="bundle.json"),
        item(name="python/evil.whl"),  # the controller would install it
        item(name="hub/models--org--other/blobs/" + "0" * 64),
        item(name="image/blobs/sha256/" + "0" * 64),
        item(name="packages/a.deb\n"),
        item(name=5),
        item(name="packages/b.deb", size=-1),
        item(name="packages/b.deb", size="1"),
        item(name="packages/b.deb", size=1 << 60),
        item(name="packages/b.deb", sha256="x"),
        item(name="packages/b.deb", path="relative"),
        item(name="packages/b.deb", path="/a\nb"),
        item(name="packages/a_1_arm64.deb"),  # twice
        change("files", 0, "sha256", "0" * 64),
        change("files", 5),
        change("files", []),
        change("files", 0, 7),
        change("image", "name", "other:1"),
        change("image", "digest", "sha256:../../../etc/cron.d/evil"),
        change("image", "blobs", ["sha256:" + "0" * 64, "../x"]),
        change("image", "media_type", "a\nb"),
        change("image", None),
        change("listing", "repo", "../../x"),
        change("listing", "repo", "org/other"),
        change("listing", "commit", "../x"),
        change("listing", "revision", "other"),
        change("listing", "files", {"../../x": {"size": 1, "sha256": SHA}}),
        change("listing", "files", {"a": {"size": 1}}),
        change("listing", "files", {"a": {"size": 1, "sha256": "../../x"}}),
        change("packages", ["a; reboot"]),
        change("left_out", "x"),
    ],
)
def test_what_a_spark_says_is_checked_before_anything_is_written(
    run: Runs, tmp_path: Path, lie: Callable[[dict[str, Any]], None]
) -> None:
    given_back = collected(tmp_path / "spark")
    lie(given_back)
    with pytest.raises(AnsibleActionFail, match="s1: refused this host's list"):
        run("fetch", bundle=str(tmp_path / "a" / "carry"), collected=given_back)
    assert run.wire.fetched == [] and not (tmp_path / "a").exists()


@pytest.mark.parametrize("body", [b"evil", b"", b"longer than it says it is"])
def test_content_other_than_its_hash_gets_no_name(run: Runs, tmp_path: Path, body: bytes) -> None:
    spark = collected(tmp_path / "spark")
    (tmp_path / "spark" / "packages" / "a_1_arm64.deb").write_bytes(body)
    with pytest.raises(AnsibleActionFail, match="was not transferred intact"):
        run("fetch", bundle=str(tmp_path / "carry"), collected=spark)
    assert [name for name in files(tmp_path / "carry") if "a_1" in name] == []


def test_a_spark_that_sends_without_end_does_not_fill_the_disk(run: Runs, tmp_path: Path) -> None:
    spark = collected(tmp_path / "spark")
    run.wire.endless = spark["files"][0]["path"]
    with pytest.raises(AnsibleActionFail, match="was not transferred"):
        run("fetch", bundle=str(tmp_path / "carry"), collected=spark)
    assert sum(path.stat().st_size for path in (tmp_path / "carry").rglob("*")) < 1 << 20
    (tmp_path / "after").write_bytes(bytes(80 << 20))  # the limit is gone again


def test_a_link_in_the_folder_is_not_written_through(run: Runs, tmp_path: Path) -> None:
    carry, outside = tmp_path / "carry", tmp_path / "outside"
    outside.mkdir()
    carry.mkdir()
    (carry / "packages").symlink_to(outside)
    with pytest.raises(AnsibleActionFail, match="symbolic link"):
        run("fetch", bundle=str(carry), collected=collected(tmp_path / "spark"))
    assert list(outside.iterdir()) == []


# -- from a stick ----------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    known = json.loads((folder / "bundle.json").read_text())
    change(known)
    (folder / "bundle.json").write_text(json.dumps(known))


@pytest.mark.parametrize(
    "lie",
    [
        change("files", "packages/../../secret", {"size": 6, "sha256": "0" * 64}),
        change("files", "../secret", {"size": 6, "sha256": "0" * 64}),
        change("files", "/etc/shadow", {"size": 6, "sha256": "0" * 64}),
        change("files", "packages/a.deb", 6),
        change("files", "packages/a.deb", {"size": "6", "sha256": "0" * 64}),
        change("files", "packages/a.deb", {"size": 6}),
        change("files", []),
        change("images", {"x": {"digest": "sha256:../../x", "media_type": "a", "size": 1, "blobs": []}}),
        change("images", 5),
        change("models", {"../../x@main": {"commit": "c" * 40, "bytes": 1, "files": []}}),
        change("models", {"a/b@main": {"commit": "c" * 40, "bytes": 1, "files": ["../../../secret"]}}),
        change("packages", {"a": 1}),
        change("system", ["ubuntu"]),
        change("system", "id", 5),
    ],
)
def test_names_and_types_of_bundle_json_are_checked(run: Runs, tmp_path: Path, lie: Any) -> None:
    made = fill(Bundle.open(tmp_path / "carry"))
    (tmp_path / "secret").write_text("secret")
    edit(made.folder, lie)
    with pytest.raises(SparkfleetError, match=r"^sparkfleet_bundle .*sparkfleet bundle FOLDER"):
        Bundle.read(made.folder)
    with pytest.raises(AnsibleActionFail):
        run("push", bundle=str(made.folder), packages=True)
    assert run.wire.sent == []


def test_a_large_bundle_json_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(b'{"version": 2, "files": [' + b"{}," * (32 << 20 >> 1) + b"0]}")
    tracemalloc.start()
    try:
        with pytest.raises(SparkfleetError, match=r"bundle\.json: more than 4194304 bytes"):
            Bundle.read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_bundle_of_more_files_than_can_be_read_again_is_not_written(tmp_path: Path) -> None:
    """A thousand files to a model are many; a bundle has room for ten such models."""
    made = fill(Bundle.open(tmp_path))
    blobs = [f"{index:064x}" for index in range(10_000)]
    made.models[MODEL]["files"] = blobs
    made.files |= {f"hub/models--{REPO.replace('/', '--')}/blobs/{name}": Entry(1 << 40, name) for name in blobs}
    made.write()
    before = (tmp_path / "bundle.json").read_bytes()
    assert len(Bundle.read(tmp_path).files) > 10_000
    made.files |= {f"python/{index}.whl": Entry(1 << 40, "0" * 64) for index in range(30_000)}
    with pytest.raises(SparkfleetError, match=r"files are more than its bundle\.json can list"):
        made.write()
    assert (tmp_path / "bundle.json").read_bytes() == before


def test_a_list_that_claims_to_be_endless_is_not_read(tmp_path: Path) -> None:
    made = fill(Bundle.open(tmp_path))
    name = "hub/.sparkfleet/models--org--model/fetching.json"
    made.files[name] = Entry(1 << 40, "0" * 64)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(SparkfleetError, match=r"fetching\.json is larger than 16777216 bytes"):
        made.text(name)


def test_a_file_that_is_a_link_is_not_sent(run: Runs, tmp_path: Path) -> None:
    made = fill(Bundle.open(tmp_path / "carry"))
    secret = tmp_path / "id_ed25519"
    secret.write_bytes(b"key")  # as long as the package that it stands in for
    for link in (made.folder / "packages" / "a_1_arm64.deb", made.folder / "packages"):
        shutil.rmtree(link) if link.is_dir() else link.unlink()
        link.symlink_to(secret if link.suffix else tmp_path)
        with pytest.raises(AnsibleActionFail, match="lacks packages/"):
            run("push", bundle=str(made.folder), packages=True)
    assert run.wire.sent == []


def test_a_file_that_was_changed_on_the_stick_is_refused_by_the_host(run: Runs, tmp_path: Path) -> None:
    made = fill(Bundle.open(tmp_path / "carry"))
    (made.folder / "packages" / "a_1_arm64.deb").write_bytes(b"bad")  # the same size
    for transport in ("ssh", "local"):
        run.wire.transport = transport
        with pytest.raises(AnsibleActionFail, match=r"a_1_arm64\.deb does not match bundle\.json"):
            run("push", bundle=str(made.folder), packages=True)
        assert not (run.host / "packages" / "a_1_arm64.deb").exists()
    (made.folder / "hub/.sparkfleet/models--org--model/fetching.json").write_text("{}")
    with pytest.raises(AnsibleActionFail, match=r"fetching\.json was changed since the bundle was made"):
        run("push", bundle=str(made.folder), models=[{"repo": REPO, "revision": "main"}])


def test_where_it_lies_is_read_on_a_spark_that_is_its_own_controller(run: Runs, tmp_path: Path) -> None:
    made = fill(Bundle.open(tmp_path / "carry"))
    run.wire.transport = "local"
    run("push", bundle=str(made.folder), images=[IMAGE], models=[{"repo": REPO, "revision": "main"}], packages=True)
    assert run.wire.sent == []
    assert (run.host / BLOB).read_bytes() == WEIGHTS and (run.host / BLOB).parent.is_symlink()
    assert not (run.host / "packages").is_symlink()
    assert (run.host / "packages" / "a_1_arm64.deb").read_bytes() == b"deb"
    assert not (run.host / "image" / "index.json").is_symlink()


def test_a_digest_that_was_carried_apart_is_checked(run: Runs, tmp_path: Path) -> None:
    made = fill(Bundle.open(tmp_path / "carry"))
    digest = made.write()
    assert hashlib.sha256((made.folder / "bundle.json").read_bytes()).hexdigest() == digest
    for right in (digest, f"sha256:{digest}", f" SHA256:{digest.upper()}\n", ""):
        assert Bundle.read(made.folder, right).files == made.files
    edit(made.folder, lambda known: None)  # another order of bytes is another file
    with pytest.raises(SparkfleetError, match=r"but sparkfleet_bundle_digest is .*was changed since"):
        Bundle.read(made.folder, digest)
    with pytest.raises(AnsibleActionFail, match="sparkfleet_bundle_digest"):
        run("push", digest=digest, bundle=str(made.folder), packages=True)
    assert run.wire.sent == []


def test_a_bundle_is_signed_as_it_is_made_and_the_signature_is_checked(
    run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, allowed = make(tmp_path, "alice"), tmp_path / "signers"
    monkeypatch.setattr(run.stage.action.wheels, "download", lambda *words: [])
    made = fill(Bundle.open(tmp_path / "carry"))
    folder = str(made.folder)
    run("python", bundle=folder, trust=(str(key), ""))
    assert any("signed: " in text for text in run.stage.printed)
    signers(tmp_path, key)
    run("push", bundle=folder, packages=True, trust=("", str(allowed)))
    before = len(run.wire.sent)
    assert before
    run("python", bundle=folder)  # nothing is new, so the signature stays
    assert Bundle.read(folder, signers=str(allowed)).files == made.files
    text = (made.folder / "bundle.json").read_bytes()
    edit(made.folder, lambda known: None)  # another order of bytes
    for call in (lambda: Bundle.read(folder, signers=str(allowed)), lambda: Target.of(signed(folder, allowed))):
        with pytest.raises(SparkfleetError, match=r"carry is not signed by anyone in .*signers"):
            call()
    with pytest.raises(AnsibleActionFail, match="carry is not signed by anyone in"):
        run("push", bundle=folder, packages=True, trust=("", str(allowed)))
    (made.folder / "bundle.json").write_bytes(text)
    made.packages.append("b")
    made.write()
    with pytest.raises(SparkfleetError, match="carry is not signed, and sparkfleet_bundle_signers wants"):
        Bundle.read(folder, signers=str(allowed))
    (made.folder / "bundle.json.sig").symlink_to(tmp_path / "alice")
    with pytest.raises(SparkfleetError, match=r"carry: bundle\.json\.sig: "):
        Bundle.read(folder, signers=str(allowed))
    assert len(run.wire.sent) == before


def signed(folder: str, allowed: Path) -> Settings:
    return Settings(model="llama31-8b-fp8", bundle=folder, bundle_signers=str(allowed))


def test_a_bundle_without_hashes_is_refused_and_can_be_made_again(run: Runs, tmp_path: Path) -> None:
    made = fill(Bundle.open(tmp_path / "carry"))
    sizes = {name: entry.size for name, entry in made.files.items()}
    edit(made.folder, lambda known: (known.pop("version"), known.update(files=sizes)))  # type: ignore[arg-type]
    with pytest.raises(SparkfleetError, match=r"without the hashes .*run `sparkfleet bundle .*carry` again"):
        Bundle.read(made.folder)
    assert run("fetch", bundle=str(made.folder), collected=collected(tmp_path / "spark"))["changed"] is True
    assert run.wire.fetched == [] and Bundle.read(made.folder).files == made.files


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(), one, max_size=4),
    max_leaves=8,
)


@given(place=st.sampled_from(["version", "system", "images", "models", "packages", "files", ""]), value=json_values)
def test_any_bundle_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, place: str, value: Any) -> None:
    folder = tmp_path_factory.mktemp("carry")
    known: Any = {"version": 2, "system": {}, "images": {}, "models": {}, "packages": [], "files": {}, place: value}
    for text in (json.dumps(known), json.dumps(value), json.dumps({**known, "files": {str(value): value}})):
        (folder / "bundle.json").write_text(text)
        try:
            made = Bundle.read(folder)
        except SparkfleetError as error:
            assert str(folder) in str(error)
        else:
            assert made.missing_files() == sorted(made.files)


@given(path=st.sampled_from(["image", "listing", "files", "packages", "model", "left_out"]), value=json_values)
def test_anything_a_spark_says_is_taken_or_refused(path: str, value: Any) -> None:
    good: dict[str, Any] = {"image": {}, "listing": {}, "packages": [], "left_out": [], "files": []}
    for given_back in ({**good, path: value}, value):
        with pytest.raises(BoundsError):
            Collected.of(given_back, IMAGE, MODEL)


# -- below a folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../x", "", "a/", ".", "a/\0"])
def test_a_name_that_leaves_the_folder_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("")
    (tmp_path / "in" / "a").mkdir(parents=True)
    with pytest.raises(BoundsError):
        bounded.open_beneath(tmp_path / "in", name)


# -- packages, with the real apt -------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("dpkg-deb") or not shutil.which("apt-get"), reason="needs apt")
def test_packages_that_conflict_are_resolved_each_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's own and the distribution's packages, in two groups; in one transaction apt refuses them."""
    source = tmp_path / "source"
    for name, more in (("docker-io-x", ""), ("docker-ce-x", "Conflicts: docker-io-x\n"), ("lib-x", "")):
        root = tmp_path / name
        (root / "DEBIAN").mkdir(parents=True)
        depends = "" if name == "lib-x" else "Depends: lib-x\n"
        (root / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
            f"{more}{depends}"
        )
        source.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--build", root, source / f"{name}_1_all.deb"], check=True, capture_output=True)
    index = []
    for deb in sorted(source.glob("*.deb")):
        control = subprocess.run(["dpkg-deb", "--field", deb], check=True, capture_output=True, text=True).stdout
        sha = hashlib.sha256(deb.read_bytes()).hexdigest()
        index.append(f"{control.strip()}\nFilename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {sha}\n")
    (source / "Packages").write_text("\n".join(index))
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] copy:{source} ./\n")
    conf = tmp_path / "apt.conf"
    conf.write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}";\nAPT::Sandbox::User "root";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(conf))
    job = Job(tmp_path / "job" / "bundle.json", "bundle", "x")
    job.acquire()
    asked = {"packages": [["docker-io-x"], ["docker-ce-x", "absent-x"]], "folder": str(tmp_path / "out")}
    names, found = bundle_collect.collect_packages(asked, job)
    assert names == ["docker-io-x", "docker-ce-x"]
    assert [item["name"] for item in found] == [
        *(f"packages/{name}_1_all.deb" for name in ("docker-ce-x", "docker-io-x", "lib-x")),
        "packages/Packages",
    ]
    with pytest.raises(bundle_collect.JobError, match="apt-get"):
        bundle_collect.collect_packages(
            {"packages": [["docker-io-x", "docker-ce-x"]], "folder": str(tmp_path / "o")}, job
        )
