"""Where tasks come from: samplers, splits, Omniglot's files, drawn glyphs, sinusoids."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import bilevel
from bilevel.meta import (
    Distortion,
    FewShotSampler,
    LabelledImages,
    SinusoidSampler,
    conv_network,
    download_omniglot,
    draw_glyphs,
    load_omniglot,
    split_classes,
)


def numbered(classes: int = 6, examples: int = 5) -> LabelledImages:
    """Images that say which they are: all pixels of image e of class c are 10 c + e, but one corner, which is 200."""
    values = torch.tensor([10 * c + e for c in range(classes) for e in range(examples)], dtype=torch.uint8)
    images = values.reshape(-1, 1, 1).repeat(1, 4, 4)
    images[:, 0, 0] = 200
    names = tuple(f"class {c}" for c in range(classes))
    return LabelledImages(images, torch.arange(classes).repeat_interleave(examples), names, names)


def test_support_and_query_are_disjoint_and_labelled() -> None:
    tasks = FewShotSampler(numbered(), ways=3, shots=2, queries=3, seed=1).sample(50)
    assert tasks.support_x.shape == (50, 6, 1, 4, 4) and tasks.query_x.shape == (50, 9, 1, 4, 4)
    assert tasks.support_x.max() <= 1.0
    support = (tasks.support_x[..., 0, 1, 1] * 255).round().int()
    query = (tasks.query_x[..., 0, 1, 1] * 255).round().int()
    seen = set()
    for s, q, ys, yq in zip(support, query, tasks.support_y, tasks.query_y, strict=True):
        assert not set(s.tolist()) & set(q.tolist())
        of_label = {int(y): {int(v) // 10 for v in s[ys == y]} for y in ys}
        assert all(len(classes) == 1 for classes in of_label.values())
        assert len(set().union(*of_label.values())) == 3
        assert all({int(v) // 10 for v in q[yq == y]} == of_label[int(y)] for y in yq)
        seen |= set().union(*of_label.values())
    assert seen == set(range(6))


def test_the_same_seed_draws_the_same_tasks_and_its_state_goes_on() -> None:
    first, second = (FewShotSampler(numbered(), ways=3, shots=1, queries=1, seed=3) for _ in range(2))
    assert torch.equal(first.sample(4).support_x, second.sample(4).support_x)
    state = first.generator.get_state()
    following = first.sample(4)
    second.sample(9)
    second.generator.set_state(state)
    assert torch.equal(second.sample(4).query_x, following.query_x)


def test_processes_share_the_tasks_of_a_draw() -> None:
    whole = FewShotSampler(numbered(), ways=3, shots=1, queries=1, seed=3).sample(5)
    parts = [FewShotSampler(numbered(), ways=3, shots=1, queries=1, seed=3).sample(5, rank=r, world=2) for r in (0, 1)]
    assert torch.equal(whole.support_x[0::2], parts[0].support_x)
    assert torch.equal(whole.support_x[1::2], parts[1].support_x)
    sinusoid = SinusoidSampler(seed=3).sample(5).query_y
    assert torch.equal(sinusoid[1::2], SinusoidSampler(seed=3).sample(5, rank=1, world=2).query_y)


def test_rotations_are_classes_of_their_own() -> None:
    sampler = FewShotSampler(numbered(2), ways=8, shots=1, queries=2, rotations=True)
    tasks = sampler.sample(3)
    corners = torch.stack([tasks.support_x[..., 0, i, j] for i in (0, -1) for j in (0, -1)], -1)
    where = (corners * 255).round().eq(200)
    assert (where.sum(-1) == 1).all()  # the marked corner, turned
    kinds = {(int(v), int(w)) for v, w in zip(
        (tasks.support_x[0, :, 0, 1, 1] * 255).round().int() // 10, where[0].int().argmax(-1), strict=True
    )}  # fmt: skip
    assert len(kinds) == 8


def test_mirrored_classes_are_classes_of_their_own() -> None:
    data = numbered(2)
    data.images[:, 0, 1] = 100  # beside the corner, so that a mirrored image is no turned one
    tasks = FewShotSampler(data, ways=16, shots=1, queries=2, rotations=True, mirrors=True).sample(3)
    bases = [torch.rot90(side, k, (-2, -1)) for side in (data.images, data.images.flip(-1)) for k in range(4)]
    kinds = {tuple(kind) for kind in torch.stack(bases)[:, ::5].flatten(0, 1).flatten(1).tolist()}
    assert len(kinds) == 16
    for x in tasks.support_x:
        # The images of class c begin at 10 c.
        values = (x * 255).round().int().flatten(1)
        body = values.masked_fill((values == 200) | (values == 100), -1).amax(1, keepdim=True)
        first = torch.where((values == 200) | (values == 100), values, values - body % 10)
        assert {tuple(kind) for kind in first.tolist()} == kinds


def alphabets(sizes: tuple[int, ...]) -> LabelledImages:
    """Images of classes in groups of these sizes: all pixels of class c are c + 1."""
    classes = sum(sizes)
    images = torch.arange(1, classes + 1, dtype=torch.uint8).repeat_interleave(3).reshape(-1, 1, 1).repeat(1, 4, 4)
    images[:, 0, 0] = 200
    groups = tuple(f"group {number}" for number, size in enumerate(sizes) for _ in range(size))
    return LabelledImages(
        images, torch.arange(classes).repeat_interleave(3), tuple(f"class {c}" for c in range(classes)), groups
    )


def test_the_classes_of_a_task_come_from_a_few_groups_and_are_turned_alike() -> None:
    data = alphabets((5, 6, 7, 8))
    tasks = FewShotSampler(data, ways=5, shots=1, queries=2, rotations=True, groups=2, seed=3).sample(400)
    classes = (tasks.support_x[..., 0, 1, 1] * 255).round().int() - 1  # (tasks, ways)
    assert all(len(set(row.tolist())) == 5 for row in classes)
    groups = [{data.groups[c] for c in row.tolist()} for row in classes]
    assert max(len(found) for found in groups) == 2
    assert len({tuple(sorted(found)) for found in groups if len(found) == 2}) == 6
    assert set(classes.flatten().tolist()) == set(range(26))
    corners = torch.stack([tasks.support_x[..., 0, i, j] for i in (0, -1) for j in (0, -1)], -1)
    where = (corners * 255).round().eq(200).int().argmax(-1)
    assert (where == where[:, :1]).all() and set(where[:, 0].tolist()) == {0, 1, 2, 3}


def test_further_groups_where_few_have_too_few_classes() -> None:
    data = alphabets((2, 2, 3, 9))
    tasks = FewShotSampler(data, ways=6, shots=1, queries=2, groups=1).sample(200)
    classes = (tasks.support_x[..., 0, 1, 1] * 255).round().int() - 1
    assert all(len(set(row.tolist())) == 6 for row in classes)
    groups = [{data.groups[c] for c in row.tolist()} for row in classes]
    assert {"group 3"} in groups and max(len(found) for found in groups) == 3
    everything = FewShotSampler(data, ways=16, shots=1, queries=2, groups=99).sample(2)
    assert everything.support_x.shape[1] == 16


def test_distortion_moves_images_by_affine_maps() -> None:
    # An image whose value is the horizontal place: what a map does to it can be read off where nothing comes from outside.
    ramp = torch.linspace(0.3, 0.7, 41).expand(1, 1, 41, 41)
    for row in ((0.8, 0.1, 0.05), (1.0, 0.0, -0.2)):
        maps = torch.tensor([[row, (0.0, 1.0, 0.0)]])
        moved = Distortion.apply(maps, ramp)[0, 0, 16:25, 16:25]
        across = (torch.arange(16, 25) - 20) / 20.5  # from −1 to 1 between the image's edges
        place = row[0] * across + row[1] * across[:, None] + row[2]
        # A pixel is 0.01; torch's cubic interpolation of a line is off by a twentieth of it.
        torch.testing.assert_close(moved, 0.5 + 0.2 * 41 / 40 * place, atol=5e-4, rtol=0)


def test_distortions_have_the_spread_that_they_promise() -> None:
    maps = Distortion(of_image=2.0).draw((50, 5, 40), torch.Generator().manual_seed(0)).flatten(0, 2)
    assert float(maps[:, :, 2].std()) == pytest.approx(2 * 0.07, rel=0.05)
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    assert float(angle.std()) == pytest.approx(2 * 0.1745, rel=0.05)
    area = torch.linalg.det(maps[:, :, :2]).log()
    assert float(area.std()) == pytest.approx(2 * 0.1 * 2**0.5, rel=0.05)
    shared = Distortion(of_class=1.0).draw((3, 4, 5), torch.Generator().manual_seed(0))
    assert torch.equal(shared, shared[:, :, :1].expand_as(shared)) and not torch.equal(shared[:, 0], shared[:, 1])


def test_distorted_tasks_are_drawn_from_the_seed_and_shared() -> None:
    def sampler() -> FewShotSampler:
        distortion = Distortion(of_class=1.0, of_image=1.0)
        return FewShotSampler(
            draw_glyphs(8, 4), ways=3, shots=1, queries=1, seed=3, mirrors=True, groups=2, distortion=distortion
        )

    first, second = sampler(), sampler()
    whole = first.sample(5)
    plain = FewShotSampler(draw_glyphs(8, 4), ways=3, shots=1, queries=1, seed=3, mirrors=True, groups=2).sample(5)
    assert whole.support_x.shape == plain.support_x.shape and not torch.equal(whole.support_x, plain.support_x)
    assert whole.query_x.min() >= 0 and whole.query_x.max() <= 1
    assert torch.equal(second.sample(5, rank=1, world=2).query_x, whole.query_x[1::2])
    assert torch.equal(second.sample(4).support_x, first.sample(4).support_x)


def test_images_that_cannot_be_distorted() -> None:
    settings: dict[str, Any] = {"ways": 2, "shots": 1, "queries": 1, "distortion": Distortion(of_class=1.0)}
    labels = [0, 0, 1, 1]
    with pytest.raises(bilevel.ArgumentError, match=r"in \[0, 1\] for a distortion, got torch.float32 from -1 to 0"):
        FewShotSampler(torch.linspace(-1, 0, 64).reshape(4, 4, 4), labels, **settings)
    with pytest.raises(bilevel.ArgumentError, match=r"in \[0, 1\]"):
        FewShotSampler(torch.full((4, 4, 4), float("nan")), labels, **settings)
    with pytest.raises(bilevel.ShapeError, match=r"\(N, H, W\)"):
        FewShotSampler(torch.rand(4, 4), labels, **settings)
    for dtype in (torch.bfloat16, torch.float64):
        tasks = FewShotSampler(torch.rand(4, 3, 5, 5), labels, dtype=dtype, **settings).sample(2)
        assert tasks.support_x.dtype == dtype and tasks.support_x.shape == (2, 2, 3, 5, 5)


def test_a_distortion_that_is_none() -> None:
    for strength in (-1.0, float("nan"), float("inf"), True, "much"):
        with pytest.raises(bilevel.ArgumentError, match="of_image to be a number >= 0"):
            Distortion(of_image=strength)


def test_classes_of_different_sizes() -> None:
    labels = [0] * 3 + [1] * 7 + [2] * 4
    images = torch.arange(14.0).reshape(14, 1, 1, 1).expand(-1, 1, 2, 2)
    tasks = FewShotSampler(images, labels, ways=3, shots=1, queries=2).sample(60)
    drawn = torch.cat([tasks.support_x, tasks.query_x], 1)[..., 0, 0, 0].reshape(60, -1)
    assert all(len(set(row.tolist())) == 9 for row in drawn)
    assert set(drawn.flatten().tolist()) == set(range(14))


def test_a_dataset_an_array_and_text_labels() -> None:
    images, labels = np.random.default_rng(0).random((8, 3, 3)), [7, 7, 9, 9, 7, 9, 7, 9]
    array = FewShotSampler(images, labels, ways=2, shots=1, queries=1).sample(2)
    dataset = FewShotSampler(list(zip(images, labels, strict=True)), ways=2, shots=1, queries=1).sample(2)
    assert torch.equal(array.support_x, dataset.support_x)
    with pytest.raises(bilevel.ArgumentError, match="labels"):
        FewShotSampler(images, ways=2, shots=1, queries=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 7, "shots": 1, "queries": 1}, "at least 7 classes"),
        ({"ways": 1, "shots": 1, "queries": 1}, "ways"),
        ({"ways": 2, "shots": 0, "queries": 1}, "shots"),
        ({"ways": 2, "shots": 3, "queries": 3}, "3 [+] 3 images"),
        ({"ways": 2, "shots": 1, "queries": 1, "groups": 0}, "groups to be a whole number >= 1"),
        ({"ways": 7, "shots": 1, "queries": 1, "rotations": True, "groups": 6}, "at least 7 classes"),
    ],
)
def test_what_cannot_be_sampled(settings: dict[str, int], message: str) -> None:
    with pytest.raises(bilevel.ArgumentError, match=message):
        FewShotSampler(numbered(), **settings)


def test_splits_keep_classes_and_groups_apart() -> None:
    data = draw_glyphs(45, 1)
    for by_group, held in ((False, 7), (True, 1)):
        rest, fresh = split_classes(data, held, seed=2, by_group=by_group)
        assert set(rest.names) | set(fresh.names) == set(data.names) and not set(rest.names) & set(fresh.names)
        assert int(rest.labels.max()) + 1 == rest.classes
        if by_group:
            assert len(set(fresh.groups)) == 1 and not set(rest.groups) & set(fresh.groups)
    for name, image in zip(fresh.names, fresh.images, strict=True):
        assert torch.equal(image, data.images[data.names.index(name)])
    with pytest.raises(bilevel.ArgumentError, match="hold out"):
        split_classes(data, 3, by_group=True)


def test_glyphs_are_the_same_each_time_and_differ_between_classes() -> None:
    few, many = draw_glyphs(4, 6, seed=1), draw_glyphs(6, 6, seed=1)
    assert few.images.dtype == torch.uint8 and few.images.shape == (24, 28, 28)
    assert torch.equal(few.images, many.images[:24])
    ink = many.images.float() / 255
    assert (ink.flatten(1).mean(1) > 0.01).all() and (ink.flatten(1).mean(1) < 0.5).all()
    means = torch.stack([ink[many.labels == c].mean(0) for c in range(6)])
    # An image is nearer to its own class's mean than to the others'.
    nearest = torch.cdist(ink.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == many.labels).float().mean() > 0.8
    with pytest.raises(bilevel.ArgumentError, match="classes"):
        draw_glyphs(0)


def test_sinusoids_are_sinusoids() -> None:
    tasks = SinusoidSampler(shots=40, queries=3, dtype=torch.float64).sample(20)
    for x, y in zip(tasks.support_x[..., 0], tasks.support_y[..., 0], strict=True):
        basis = torch.stack([x.sin(), x.cos()], -1)
        a, b = torch.linalg.lstsq(basis, y).solution
        torch.testing.assert_close(basis @ torch.stack([a, b]), y)
        assert 0.1 <= float((a**2 + b**2).sqrt()) <= 5.0
    with pytest.raises(bilevel.ArgumentError, match="shots"):
        SinusoidSampler(shots=0)


def characters(alphabets: int = 2, each: int = 3, examples: int = 4) -> dict[str, bytes]:
    files = {}
    random = np.random.default_rng(0)
    for a in range(alphabets):
        for c in range(each):
            for e in range(examples):
                out = io.BytesIO()
                Image.fromarray((random.random((105, 105)) > 0.1).astype(np.uint8) * 255).convert("1").save(out, "PNG")
                files[f"images_background/Alphabet{a}/character{c:02}/{c:04}_{e:02}.png"] = out.getvalue()
    return files


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "images_background"


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_omniglot_from_folder_zip_and_cache(tmp_path: Path) -> None:
    files = characters()
    folder, archive = unpacked(tmp_path, files), zipped(tmp_path / "x.zip", files)
    cache = tmp_path / "cache"
    first = load_omniglot(folder, cache=cache)
    assert first.images.shape == (24, 28, 28) and first.classes == 6 and set(first.groups) == {"Alphabet0", "Alphabet1"}
    assert first.names[0] == "Alphabet0/character00" and torch.bincount(first.labels).tolist() == [4] * 6
    # Ink is bright: the pictures were nine tenths white paper.
    assert 0.02 < float((first.images.float() / 255).mean()) < 0.2
    for again in (load_omniglot(archive, cache=cache), load_omniglot(folder, cache=cache)):
        assert torch.equal(again.images, first.images) and again.names == first.names and again.groups == first.groups
    kept = sorted(cache.iterdir())
    assert len(kept) == 2
    for file in kept:
        file.write_bytes(b"cut off")
    assert torch.equal(load_omniglot(folder, cache=cache).images, first.images)
    assert load_omniglot(folder, size=14, cache=cache).images.shape == (24, 14, 14)


def test_a_changed_folder_is_read_again(tmp_path: Path) -> None:
    folder = unpacked(tmp_path, characters())
    assert load_omniglot(folder, cache=tmp_path / "cache").classes == 6
    for image in (folder / "Alphabet1" / "character02").iterdir():
        image.unlink()
    assert load_omniglot(folder, cache=tmp_path / "cache").classes == 5


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    folder = unpacked(tmp_path, characters(1, 1, 2))
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert load_omniglot(folder, cache=blocked / "cache").classes == 1


def test_omniglot_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(bilevel.ArgumentError, match="does not exist"):
        load_omniglot(tmp_path / "missing")
    with pytest.raises(bilevel.ArgumentError, match="no such file"):
        load_omniglot(tmp_path)
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    with pytest.raises(bilevel.ArgumentError, match="neither a folder nor a zip file"):
        load_omniglot(text)
    poisoned = unpacked(tmp_path / "s", {"images_background/A/b/1.png": b"no picture"})
    with pytest.raises(bilevel.ArgumentError, match="not an image"):
        load_omniglot(poisoned, cache=tmp_path / "cache")


def test_a_download_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    asked = {}

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.update(url=url, known_hash=known_hash)
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert download_omniglot("images_evaluation", folder=tmp_path) == tmp_path / "images_evaluation.zip"
    assert asked["url"].endswith("/images_evaluation.zip") and asked["known_hash"].startswith("md5:")

    def offline(*args: object, **settings: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(bilevel.ArgumentError, match="could not be fetched"):
        download_omniglot(folder=tmp_path)
    with pytest.raises(bilevel.ArgumentError, match="images_background"):
        download_omniglot("images")


def test_the_real_characters(shared_data: Path, tmp_path: Path) -> None:
    data = load_omniglot(shared_data / "omniglot", cache=tmp_path)
    assert data.images.shape == (19280, 28, 28) and data.classes == 964 and len(set(data.groups)) == 30
    tasks = FewShotSampler(data, ways=5, shots=1, queries=15).sample(2)
    assert conv_network(5)(tasks.query_x[0]).shape == (75, 5)
