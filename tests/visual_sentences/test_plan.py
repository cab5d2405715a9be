"""Plans: units of the wanted size, kept in a file that stays readable."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from tokenizer.cli import CommandError
from visual_sentences.build import Build, prepare
from visual_sentences.manifest import Manifest
from visual_sentences.plan import Plan, load_plans, make_plan, planned, write_plan
from visual_sentences.sentence import Item
from visual_sentences.spec import Source, Spec, load_spec

GOLDEN = Path(__file__).parent / "golden"


def test_the_golden_manifest_of_version_2_is_readable(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "manifest-2.json", tmp_path / "manifest.json")
    manifest = Manifest.load(tmp_path)
    photos, tars = manifest.sources
    assert (manifest.form, manifest.generation, manifest.images_per_row) == ("images", 1, 0)
    assert (photos.classes, photos.augment, photos.bad) == (("a", "b"), 2, {"not an image": 1})
    assert (tars.classes, tars.augment, tars.inputs) == ((), 1, 2)
    assert manifest.rows("train") == {"photos": 12, "tars": 1} and manifest.splits == [
        "train",
        "val",
    ]
    assert manifest.hash.startswith("5900db0a6f15ccfc"), "runs on such data would be refused"
    manifest.save(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == (GOLDEN / "manifest-2.json").read_text()


def test_the_golden_plan_of_version_1_is_readable(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "plan-001.arrow", tmp_path)
    sources = (Source(name="photos", kind="category"), Source(name="tars", kind="image"))
    spec = Spec(seed=0, row_len=None, image_size=16, sources=sources, raw={})
    (plan,) = load_plans(spec, tmp_path)
    photos, tars = plan.units
    assert (photos.name, photos.images) == ("photos-train-00000", 7)
    assert (tars.name, tars.images, tars.split) == ("tars--00000", 2, "")
    items = planned(tmp_path, photos)
    assert len(items) == 7 and Item("a/0", ("a/0.png",), "a") in items
    assert planned(tmp_path, tars) == [Item("0", ("x-0.tar",))]
    assert plan.listed["photos"].classes == ["a", "b"] and plan.listed["tars"].bad == []


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    whole = (GOLDEN / "plan-001.arrow").read_bytes()
    (tmp_path / "plan-001.arrow").write_bytes(whole[: len(whole) // 2])
    spec = Spec(seed=0, row_len=None, image_size=16, sources=(), raw={})
    with pytest.raises(CommandError, match=r"plan-001.arrow cannot be read .* choose another"):
        load_plans(spec, tmp_path)


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    table = pa.ipc.open_file(str(GOLDEN / "plan-001.arrow")).read_all()
    notes = json.loads(table.schema.metadata[b"plan"]) | {"version": 9, "units": []}
    table = table.replace_schema_metadata({"plan": json.dumps(notes)})
    with pa.ipc.new_file(str(tmp_path / "plan-001.arrow"), table.schema) as writer:
        writer.write_table(table)
    spec = Spec(seed=0, row_len=None, image_size=16, sources=(), raw={})
    with pytest.raises(CommandError, match=r"version .*9.*wanted .*1"):
        load_plans(spec, tmp_path)


@pytest.fixture
def plan_of(data: Path, tok_dir: Path, tmp_path: Path) -> Callable[..., tuple[Plan, Path]]:
    def plan(spec: Path, *, rows: int) -> tuple[Plan, Path]:
        command = Build(spec=spec, tokenizer=tok_dir, out=tmp_path)
        loaded = load_spec(spec)
        job, _ = prepare(command, loaded)
        return make_plan(loaded, job, shard_rows=rows, before=[], out=tmp_path), tmp_path

    return plan


def test_units_fill_the_rows_that_are_wanted(
    plan_of: Callable[..., tuple[Plan, Path]], data: Path
) -> None:
    plan, _ = plan_of(data / "mix.toml", rows=2)  # of 4 images
    files = {unit.name: unit.images for unit in plan.units}
    photos = [files[name] for name in files if name.startswith("photos-train")]
    assert set(photos[:-1]) == {8} and 0 < photos[-1] <= 8
    assert [files[name] for name in files if name.startswith("depth")] == [8] * 5  # 4 pairs each
    assert len([name for name in files if name.startswith("clips")]) == 6  # 2 passes: 1 clip each
    assert sum(files.values()) == 30 + 40 + sum(2 + 2 * c for c in range(6))


def test_a_plan_does_not_change_from_run_to_run(
    plan_of: Callable[..., tuple[Plan, Path]], data: Path, every: Path
) -> None:
    for spec in (data / "mix.toml", every / "every.toml"):
        plan, out = plan_of(spec, rows=3)
        write_plan(plan, out)
        before = (out / "plan-001.arrow").read_bytes()
        write_plan(plan_of(spec, rows=3)[0], out)
        assert (out / "plan-001.arrow").read_bytes() == before
        (read,) = load_plans(load_spec(spec), out)
        assert read == replace(plan, batches=())
        (out / "plan-001.arrow").unlink()


@pytest.mark.parametrize(("rows", "units"), [(1, 3), (2, 2), (3, 1), (99, 1)])
def test_whole_tars_are_put_together_to_the_wanted_size(
    plan_of: Callable[..., tuple[Plan, Path]], every: Path, rows: int, units: int
) -> None:
    """Three tars of 8 images each, in rows of 8 images."""
    plan, _ = plan_of(every / "every.toml", rows=rows)
    found = [unit for unit in plan.units if unit.source.name == "image"]
    assert len(found) == units and sum(unit.images for unit in found) == 24
    assert {unit.split for unit in found} == {""}


def test_a_unit_has_whole_bunches_of_few_classes(
    write_images: Callable[..., None], tok_dir: Path, tmp_path: Path
) -> None:
    """Units of one row of 4 images; without bunches their images would be of several classes."""
    write_images(tmp_path / "x", [f"{c}/{i}.png" for c in range(6) for i in range(8)], seed=1)
    spec = tmp_path / "mix.toml"
    spec.write_text('row_len = 256\n[[source]]\nname = "c"\nkind = "category"\npath = "x"\n')
    loaded, out = load_spec(spec), tmp_path / "out"
    job, _ = prepare(Build(spec=spec, tokenizer=tok_dir, out=out), loaded)
    out.mkdir()
    plan = make_plan(loaded, job, shard_rows=1, before=[], out=out)
    write_plan(plan, out)
    groups = [{item.group for item in planned(out, unit)} for unit in plan.units]
    assert len(groups) == 12 and all(len(found) == 1 for found in groups)
    assert groups != sorted(groups, key=min), "bunches come in seeded order"


def test_a_damaged_first_tar_does_not_put_all_others_into_one_unit(
    plan_of: Callable[..., tuple[Plan, Path]], every: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(every / "tars", root / "tars")
    (root / "tars/rgb-0.tar").write_bytes(b"no tar at all")
    spec = root / "mix.toml"
    spec.write_text(
        'row_len = 512\n[[source]]\nname = "i"\nkind = "image"\npath = "tars/rgb-*.tar"\n'
    )
    plan, _ = plan_of(spec, rows=1)
    assert [unit.images for unit in plan.units] == [0, 8, 8]
