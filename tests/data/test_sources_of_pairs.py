import csv
import json
import os

import pyarrow
import pytest
from curation_case import curated, files_in, jpeg, pair, photograph
from pyarrow import parquet
from shards_case import files_of, samples_of, write_files

from icd_lightning.data.curation.recipe import Recipe
from icd_lightning.data.curation.sources import find_units, read_unit

PLAIN = Recipe()


def captions(folder) -> list[str]:
    return [sample["txt"].decode() for sample in samples_of(folder)]


def write_pictures(folder, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(photograph(number)))
    return names


def test_shards_keep_their_pictures_and_fields(tmp_path):
    pairs = [pair(number) for number in range(3)]
    write_files(tmp_path / "raw" / "00000.tar", files_of(pairs))
    curated([tmp_path / "raw"], tmp_path / "out", PLAIN)
    found = samples_of(tmp_path / "out")
    assert [sample["jpg"] for sample in found] == [one["jpg"] for one in pairs]
    about = json.loads(found[1]["json"])
    assert about["url"] == "http://x/1"
    assert about["from"] == "00000.tar/000000001"
    assert about["original_size"] == [96, 96]


def test_a_table_beside_pictures(tmp_path):
    names = write_pictures(tmp_path / "raw", 3)
    (tmp_path / "secret.jpg").write_bytes(jpeg(photograph(9)))
    with (tmp_path / "raw" / "pairs.csv").open("w", newline="") as file:
        rows = [[name, f"picture {name}", "me"] for name in [*names, "gone.jpg", "../secret.jpg"]]
        csv.writer(file).writerows([["file_name", "caption", "by"], *rows])
    manifest, _ = curated([tmp_path / "raw"], tmp_path / "out", PLAIN)
    assert captions(tmp_path / "out") == [f"picture {name}" for name in names]
    assert manifest.parameters["dropped"] == {"no_image": 2}
    assert json.loads(samples_of(tmp_path / "out")[0]["json"])["by"] == "me"


def test_annotations_of_coco(tmp_path):
    names = write_pictures(tmp_path / "train2017", 3)
    images = [{"id": 10 + number, "file_name": name} for number, name in enumerate(names)]
    notes = [{"image_id": id_, "caption": text} for id_, text in ((10, "first"), (12, "third"), (10, "second"))]
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    manifest, _ = curated([file], tmp_path / "out", PLAIN)
    assert captions(tmp_path / "out") == ["first", "third"]
    assert manifest.parameters["dropped"] == {"no_caption": 1}


@pytest.mark.parametrize("form", ["datasets", "bytes", "paths"])
def test_parquet(tmp_path, form):
    names = write_pictures(tmp_path / "raw", 5)
    content = [jpeg(photograph(number)) for number in range(5)]
    structs = [{"bytes": data, "path": name} for data, name in zip(content, names, strict=True)]
    pictures = {"datasets": structs, "bytes": content, "paths": names}[form]
    table = pyarrow.table({"image": pictures, "text": [f"picture {number}" for number in range(5)], "n": range(5)})
    parquet.write_table(table, tmp_path / "raw" / "0.parquet", row_group_size=2)
    assert len(find_units([str(tmp_path / "raw")])) == 3
    curated([tmp_path / "raw"], tmp_path / "out", PLAIN)
    found = samples_of(tmp_path / "out")
    assert [sample["jpg"] for sample in found] == content
    assert [json.loads(sample["json"])["n"] for sample in found] == [*range(5)]


def test_a_hub_set_is_parquet_that_fsspec_reads(tmp_path):
    table = pyarrow.table({"image": [jpeg(photograph(0))], "text": ["one"]})
    parquet.write_table(table, tmp_path / "0.parquet")
    (unit,) = find_units([f"local://{tmp_path}/*.parquet"])  # as hf://datasets/owner/name/*.parquet
    assert [raw["txt"] for raw in read_unit(unit, [])] == [b"one"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"url": ["http://x"], "text": ["x"]},
            r"no column of a picture \(it has url, text\): it holds addresses",
        ),
        ({"image": ["x.jpg"], "words": ["x"]}, r"no column of a caption .*name its column caption"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_without_pictures_or_captions_is_refused(tmp_path, columns, message, ending):
    file = tmp_path / f"0.{ending}"
    if ending == "csv":
        file.write_text("\n".join([",".join(columns), ",".join(column[0] for column in columns.values())]))
    else:
        parquet.write_table(pyarrow.table(columns), file)
    with pytest.raises(ValueError, match=message):
        curated([file], tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.parquet", "no table", "0.parquet is no Parquet file"),
        ("0.json", "{", "0.json is no JSON"),
        ("0.json", "{}", "0.json holds no captions as COCO's annotations do"),
        ("0.json", '{"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": []}', "x.jpg of .* is in none of"),
        ("0.csv", "", "no column of a picture"),
        ("0.csv", 'image,caption\nx.jpg,"a\n', "0.csv cannot be read as a CSV file"),
        ("0.json", '{"images": [{"id": 1, "file_name": 5}], "annotations": []}', "5 of .* is in none of"),
        ("0.tar.gz", "", "does not exist|compressed"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        curated([tmp_path / name if name != "0.tar.gz" else tmp_path / "0.tar"], tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_changed_input_is_refused(tmp_path):
    shard = write_files(tmp_path / "raw" / "00000.tar", files_of([pair(1), pair(2)]))
    curated([shard], tmp_path / "out")
    before = files_in(tmp_path / "out")
    os.utime(shard, (0, 0))
    with pytest.raises(ValueError, match=r"00000.tar has changed since it was curated: choose another folder"):
        curated([shard], tmp_path / "out")
    assert files_in(tmp_path / "out") == before


NAMES = ["a\0b.jpg", "x" * 5000 + ".jpg", "raw", "..", "", "/dev/zero", "C:\\\\0.jpg", "\x1b[2J"]
"""Of pictures that cannot be."""


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_a_name_that_is_none_loses_its_own_pair_alone(tmp_path, ending):
    good, odd = write_pictures(tmp_path, 2), [*NAMES, *([5, None] if ending == "json" else [])]
    (tmp_path / "raw").mkdir()
    names, file = [good[0], *odd, good[1]], tmp_path / f"pairs.{ending}"
    if ending == "csv":
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([["image", "caption"], *([name, "a cat"] for name in names)])
    elif ending == "json":
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        notes = [{"image_id": number, "caption": "a cat"} for number in range(len(names) + 1)]
        file.write_text(json.dumps({"images": [*images, {"id": len(names)}], "annotations": notes}))
    else:
        parquet.write_table(pyarrow.table({"image": names, "caption": ["a cat"] * len(names)}), file)
    manifest, _ = curated([file], tmp_path / "out", PLAIN)
    lost = len(odd) + (ending == "json")
    assert (manifest.samples, manifest.parameters["dropped"]) == (2, {"no_image": lost})


def test_captions_of_a_table_that_are_cut_or_lost_are_dropped(tmp_path):
    """By a comma that is not quoted, or by another encoding."""
    names = write_pictures(tmp_path, 3)
    rows = [f"{names[0]},a cat, on a bench", f"{names[1]},un café", f"{names[2]},a dog"]
    (tmp_path / "pairs.csv").write_bytes("\n".join(["image,caption", *rows]).encode("cp1252"))
    manifest, _ = curated([tmp_path / "pairs.csv"], tmp_path / "out", PLAIN)
    assert captions(tmp_path / "out") == ["a dog"]
    assert manifest.parameters["dropped"] == {"bad_caption": 1, "no_caption": 1}


def test_where_nothing_could_be_read_no_change_of_the_recipe_is_asked_for(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\nnone.jpg,a cat\n")
    with pytest.raises(
        ValueError, match=r"\(no_image 1\): none could be read, see that the inputs are whole"
    ) as refused:
        curated([tmp_path / "pairs.csv"], tmp_path / "out", PLAIN)
    assert "recipe" not in str(refused.value)
    (tmp_path / "none.jpg").write_bytes(jpeg(photograph(0)))
    assert curated([tmp_path / "pairs.csv"], tmp_path / "out", PLAIN, overwrite=True)[0].samples == 1
