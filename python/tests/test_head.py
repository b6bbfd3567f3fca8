"""A head's step over NumPy, against a naive one in float64, and what there is to save and restore."""

import inspect
import json
import time

import numpy as np
import pytest

import partialfc
from partialfc.options import CHOICES, FIELDS, fill, names
from conftest import CLASSES, DIM, batch, make, on_ranks


def naive(weight, embeddings, labels, scale=64.0, margin=0.5):
    """Loss and gradients of ArcFace over all classes, in float64."""
    w, e = weight.astype(np.float64), embeddings.astype(np.float64)
    norms_w = np.linalg.norm(w, axis=1, keepdims=True)
    norms_e = np.linalg.norm(e, axis=1, keepdims=True)
    cosines = (e / norms_e) @ (w / norms_w).T
    rows = np.arange(len(e))
    target = cosines[rows, labels]
    angle = np.arccos(target)
    logits = scale * cosines
    logits[rows, labels] = scale * np.cos(angle + margin)
    shifted = logits - logits.max(axis=1, keepdims=True)
    softmax = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    loss = -np.log(softmax[rows, labels]).mean()
    d_logits = softmax.copy()
    d_logits[rows, labels] -= 1
    d_cosines = scale * d_logits / len(e)
    d_cosines[rows, labels] *= np.sin(angle + margin) / np.sin(angle)

    def through_norm(unit, gradient, norms):
        return (gradient - unit * (unit * gradient).sum(axis=1, keepdims=True)) / norms

    return (
        loss,
        through_norm(e / norms_e, d_cosines @ (w / norms_w), norms_e),
        through_norm(w / norms_w, d_cosines.T @ (e / norms_e), norms_w),
    )


def test_a_step_is_the_naive_one(head):
    embeddings, labels = batch()
    before = head.read_centers()
    loss, grad_embeddings, grad_centers = naive(before, embeddings, labels)
    told, gradient = head.step(embeddings, labels, learning_rate=0.1)
    assert told == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(gradient, grad_embeddings, rtol=1e-3, atol=1e-5 * np.abs(grad_embeddings).max())
    after = before - 0.1 * (grad_centers + 5e-4 * before)
    np.testing.assert_allclose(head.read_centers(), after, rtol=1e-4, atol=1e-5 * np.abs(after).max())


def test_three_calls_are_one_step():
    embeddings, labels = batch()
    with make() as whole, make() as parts:
        for _ in range(3):
            loss, gradient = whole.step(embeddings, labels, 0.1)
            assert parts.forward(embeddings, labels) == loss
            np.testing.assert_array_equal(parts.backward(), gradient)
            parts.update(0.1)
        np.testing.assert_array_equal(whole.read_centers(), parts.read_centers())


def test_weights_and_scales(head):
    embeddings, labels = batch()
    head.forward(embeddings, labels)
    one = head.backward()
    head.forward(embeddings, labels)
    out = np.empty_like(one)
    assert head.backward(out, loss_weight=0.5, loss_scale=8.0) is out
    np.testing.assert_allclose(out, 4 * one, rtol=1e-6)


def test_micro_batches_are_one_update():
    embeddings, labels = batch(6)
    others, more = batch(4, seed=1)
    with make(momentum=0.0, weight_decay=0.0) as head, make(momentum=0.0, weight_decay=0.0) as one:
        start = head.read_centers()
        moves = []
        for e, y in ((embeddings, labels), (others, more)):
            one.write_centers(start)
            one.forward(e, y)
            one.backward(loss_weight=0.5)
            one.update(0.1)
            moves.append(one.read_centers() - start)
            head.forward(e, y)
            head.backward(loss_weight=0.5)
            head.accumulate()
        head.update(0.1, factor=2.0, device_factor=np.array([0.5], np.float32))
        np.testing.assert_allclose(head.read_centers() - start, moves[0] + moves[1], atol=1e-6)
        assert head.own_metrics().updates == 1


def test_a_factor_that_is_not_finite_skips_the_update(head):
    embeddings, labels = batch()
    before = head.read_centers()
    head.forward(embeddings, labels)
    head.backward()
    head.update(0.1, device_factor=np.array([np.inf], np.float32))
    np.testing.assert_array_equal(head.read_centers(), before)
    assert (head.own_metrics().skipped_updates, head.metrics().updates) == (1, 0)
    for wrong, kind, text in (
        (np.ones(2, np.float32), ValueError, "device_factor has 2 elements on rank 0; it must have 1"),
        (np.ones(1), TypeError, "device_factor is float64 on rank 0; it must be float32"),
    ):
        with pytest.raises(kind, match=text):
            head.update(0.1, device_factor=wrong)


def test_prepared_labels_and_given_samples():
    embeddings, labels = batch()
    with make(sample_rate=0.3) as head:
        head.prepare(labels)
        head.forward(embeddings)
        sample = head.sample_ids()
        assert sample.dtype == np.int64 and set(labels) <= set(sample.tolist())
        head.set_sample(np.array([0, 7, 19]))
        head.forward(embeddings, labels)
        assert set(head.sample_ids().tolist()) == {0, 7, 19} | set(labels.tolist())


def test_negatives_in_blocks():
    embeddings, labels = batch(classes=1000)
    with partialfc.Head(1000, DIM, 16, sample_rate=0.2, sample_block=16, device=partialfc.Device.cpu(1)) as head:
        head.forward(embeddings, labels)
        sample = head.sample_ids()
        runs = 1 + np.count_nonzero(np.diff(sample) > 1)
        assert len(sample) == 200 and runs <= 200 // 16 + 2 * len(labels) + 2
        assert head.options["sample_block"] == 16
    with pytest.raises(partialfc.PartialFCError, match="sample_block must be a power of two, 1 to 1024, got 24"):
        partialfc.Head(1000, DIM, 16, sample_block=24)


def test_rows_in_bfloat16(tmp_path):
    embeddings, labels = batch(classes=1000)
    options = {"weight_dtype": "bf16", "state_dtype": "bf16", "device": partialfc.Device.cpu(1)}
    with partialfc.Head(1000, DIM, 16, **options) as head:
        before = head.read_centers()
        head.step(embeddings, labels, 0.1, np.empty_like(embeddings))
        after = head.read_centers()
        assert (after.view(np.uint32) & 0xFFFF == 0).all() and (after != before).any()
        assert (head.options["weight_dtype"], head.options["state_dtype"]) == ("bf16", "bf16")
        head.save(tmp_path)
    with partialfc.Head(1000, DIM, 16, device=partialfc.Device.cpu(1)) as wide:
        wide.load(tmp_path)
        np.testing.assert_array_equal(wide.read_centers(), after)
    narrow = partialfc.plan(1000, DIM, batch=16, weight_dtype="bf16")
    wide = partialfc.plan(1000, DIM, batch=16)
    assert (narrow.weight_bytes, narrow.state_bytes) == (wide.weight_bytes // 2, wide.state_bytes)
    with pytest.raises(ValueError, match="weight_dtype is 'f16'; it must be 'f32' or 'bf16'"):
        partialfc.Head(1000, DIM, 16, weight_dtype="f16")


def test_rows_in_a_file(tmp_path):
    embeddings, labels = batch(classes=1000)
    where = {"residency": "file", "storage_path": tmp_path / "rows"}
    losses = []
    for options in ({}, where, {**where, "storage_cache": 400 * DIM * 8}):
        with partialfc.Head(1000, DIM, 16, sample_rate=0.3, device=partialfc.Device.cpu(1), **options) as head:
            grad = np.empty_like(embeddings)
            losses.append([head.step(embeddings, labels, 0.1, grad)[0] for _ in range(4)] + [head.read_centers().sum()])
            if options:
                assert [file.name for file in where["storage_path"].iterdir()] == ["rows-0-of-1.partialfc"]
                assert (head.options["residency"], head.options["storage_path"]) == ("file", str(where["storage_path"]))
                with pytest.raises(partialfc.PartialFCError, match="another head has its rows in it"):
                    partialfc.Head(1000, DIM, 16, **where)
    assert losses[0] == losses[1] == losses[2]
    assert list(where["storage_path"].iterdir()) == []
    report = partialfc.plan(1000, DIM, batch=16, sample_rate=0.3, **where)
    assert (report.weight_bytes, report.storage_bytes) == (300 * DIM * 4, 16 * 4096)
    report = partialfc.plan(1000, DIM, batch=16, sample_rate=0.3, storage_cache=500 * DIM * 8, **where)
    assert (report.weight_bytes, report.storage_bytes) == (800 * DIM * 4, 8 * 4096)
    with pytest.raises(partialfc.PartialFCError, match="storage_path must not be NULL"):
        partialfc.Head(1000, DIM, 16, residency="file")
    with pytest.raises(TypeError, match="storage_path is 7"):
        partialfc.Head(1000, DIM, 16, residency="file", storage_path=7)


def test_a_save_beside_training(tmp_path):
    embeddings, labels = batch(classes=1000)
    with partialfc.Head(1000, DIM, 16, device=partialfc.Device.cpu(1)) as head:
        grad = np.empty_like(embeddings)
        head.step(embeddings, labels, 0.1, grad)
        before, told = head.read_centers(), []
        head.save_start(tmp_path, progress=lambda done, total: told.append((done, total)))
        head.step(embeddings, labels, 0.1, grad)
        with pytest.raises(partialfc.PartialFCError, match="a save is under way"):
            head.save(tmp_path)
        while not head.save_poll(progress=lambda done, total: told.append((done, total))):
            time.sleep(0.001)
        with pytest.raises(partialfc.PartialFCError, match="no save is under way"):
            head.save_poll()
        assert told[0] == (0, 1000 * DIM * 8) and told[-1] == (1000 * DIM * 8, 1000 * DIM * 8)
        assert not np.array_equal(head.read_centers(), before)
        head.load(tmp_path)
        np.testing.assert_array_equal(head.read_centers(), before)
        with pytest.raises(TypeError, match="progress is a int"):
            head.save_poll(progress=7)
        with pytest.raises(TypeError, match="expected str, bytes or os.PathLike object, not int"):
            head.save_start(7)


def test_classes_come_and_go(tmp_path):
    embeddings, labels = batch(classes=20)
    cpu = {"device": partialfc.Device.cpu(1)}
    with partialfc.Head(20, DIM, 16, **cpu) as head:
        head.step(embeddings, labels, 0.1)
        head.save(tmp_path)
        before = head.read_centers()
    table = np.arange(20)
    table[3], table[9] = -1, 4
    with partialfc.Head(25, DIM, 16, **cpu) as wide:
        start = wide.read_centers()
        wide.load(tmp_path, class_map=table)
        after = wide.read_centers()
        kept = [c for c in range(20) if c not in (3, 4, 9)]
        np.testing.assert_array_equal(after[kept], before[kept])
        np.testing.assert_array_equal(after[[3, 9, *range(20, 25)]], start[[3, 9, *range(20, 25)]])
        units = before / np.linalg.norm(before, axis=1, keepdims=True)
        both = units[4] + units[9]
        np.testing.assert_allclose(after[4] / np.linalg.norm(after[4]), both / np.linalg.norm(both), atol=1e-6)
        np.testing.assert_array_equal(wide.read_state()[[3, 4, 9]], np.zeros((3, DIM)))
        wide.step(embeddings, table[labels.clip(10)], 0.1)
        for wrong, message in ((table * 0.5, "class_map is float64 of shape"), (table.reshape(4, 5), "it must be a vector")):
            with pytest.raises(TypeError, match=message):
                wide.load(tmp_path, class_map=wrong)
        with pytest.raises(partialfc.PartialFCError, match="class_map has 19 entries"):
            wide.load(tmp_path, class_map=table[1:])
        with pytest.raises(partialfc.PartialFCError, match="num_classes is 20 in the checkpoint"):
            wide.load(tmp_path)


def test_classes_change_while_a_head_trains():
    with make(sample_rate=0.5) as head:
        head.step(*batch(), 0.1)
        classes, before = head.num_classes, head.read_centers()
        told = []
        head.resize(classes + 5, progress=lambda done, total: told.append((done, total)))
        assert head.num_classes == head.options["num_classes"] == classes + 5 and head.shard == (0, classes + 5)
        assert told[0][0] == 0 and told[-1][0] == told[-1][1] > 0
        np.testing.assert_array_equal(head.read_centers(count=classes), before)
        table = np.arange(classes + 5)
        table[[0, -1]] = table[[-1, 0]]
        table[3] = -1
        head.remap(table)
        np.testing.assert_array_equal(head.read_centers(classes + 4, 1)[0], before[0])
        head.resize(classes)
        moved = head.merge({2: 5, 4: 5}, class_weights=np.ones(classes))
        assert head.num_classes == classes - 2 == moved.max() + 1 and moved[2] == moved[4] == moved[5] == 3
        assert (head.merge([]) == np.arange(classes - 2)).all()
        head.step(batch()[0], moved[batch()[1].clip(0, classes - 1)], 0.1)


def test_other_classes_that_cannot_be(head):
    classes = head.num_classes
    for wrong, error, message in (
        (lambda: head.resize(0), partialfc.PartialFCError, "num_classes must be at least 1"),
        (lambda: head.resize(2.5), TypeError, "float"),
        (lambda: head.resize(-1), ValueError, "num_classes is -1"),
        (lambda: head.resize(3, progress=5), TypeError, "progress is a int"),
        (lambda: head.remap(np.zeros(classes)), TypeError, "class_map is float64 of shape"),
        (lambda: head.remap(np.zeros(classes - 1, int)), partialfc.PartialFCError, "class_map has"),
        (lambda: head.remap(np.arange(classes), classes - 1), partialfc.PartialFCError, "must be -1 or a class of the head"),
        (lambda: head.merge([(1, 2, 3)]), TypeError, "it must be pairs of classes"),
        (lambda: head.merge({1: 1}), partialfc.PartialFCError, "which is in from itself"),
        (lambda: head.merge({1: 2}, class_weights=["a"]), TypeError, "it must be a vector of numbers"),
        (lambda: head.merge({1: 2}, class_weights=[1.0]), partialfc.PartialFCError, "class_weights has 1 entries"),
    ):
        with pytest.raises(error, match=message):
            wrong()
        assert head.num_classes == classes == head.shard[1]

    def fails(done, total):
        raise KeyError("mine")

    # What it raises comes when the classes have changed.
    with pytest.raises(KeyError, match="mine"):
        head.resize(classes + 1, progress=fails)
    assert head.num_classes == classes + 1 == head.shard[1]


def test_top_k(head):
    embeddings, _ = batch(rows=20)
    weight = head.read_centers()
    cosines = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)) @ (weight / np.linalg.norm(weight, axis=1, keepdims=True)).T
    ids, found = head.top_k(embeddings, 3)
    np.testing.assert_array_equal(ids, np.argsort(-cosines, axis=1)[:, :3])
    np.testing.assert_allclose(found, -np.sort(-cosines, axis=1)[:, :3], rtol=1e-5)
    mine = np.empty((20, 3), np.int64), np.empty((20, 3), np.float32)
    assert head.top_k(embeddings, 3, *mine)[0] is mine[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("row_update", ["lazy", "dense"])
def test_a_restored_head_goes_on_to_the_bit(optimizer, row_update):
    options = {"optimizer": optimizer, "row_update": row_update, "sample_rate": 0.3}
    with make(**options) as first, make(**options) as second:
        for seed in range(3):
            first.step(*batch(seed=seed), 0.05)
        progress = first.read_progress()
        second.write_centers(first.read_centers())
        for name in first.states:
            second.write_state(first.read_state(name), name)
        second.write_progress(*progress)
        for seed in range(3, 6):
            assert first.step(*batch(seed=seed), 0.05)[0] == second.step(*batch(seed=seed), 0.05)[0]
        np.testing.assert_array_equal(first.read_centers(), second.read_centers())


def test_rows_of_part_of_a_shard(head):
    rows = np.full((3, DIM), 2, np.float32)
    head.write_centers(rows, first=4)
    np.testing.assert_array_equal(head.read_centers(first=4, count=3), rows)
    out = np.zeros((3, DIM), np.float32)
    assert head.read_centers(first=4, out=out) is out
    np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_two_ranks_are_one(placement):
    embeddings, labels = batch(rows=8)
    with make() as alone:
        losses = [alone.step(embeddings, labels, 0.1)[0] for _ in range(3)]
        weight = alone.read_centers()

    def run(comm):
        with make(comm=comm, placement=placement) as head:
            mine = slice(comm.rank * 5, 5 + comm.rank * 3)
            told = [head.step(embeddings[mine], labels[mine], 0.1)[0] for _ in range(3)]
            return told, head.shard, head.read_centers()

    for told, (first, count), centers in on_ranks(run):
        np.testing.assert_allclose(told, losses, rtol=1e-5)
        np.testing.assert_allclose(centers, weight[first : first + count], rtol=1e-3, atol=1e-5)
        assert count == (CLASSES if placement == "replicated" else CLASSES // 2)


def test_metrics_are_kept_for_a_logger():
    embeddings, labels = batch()
    with make(metrics_every=2) as head:
        loss, _ = head.step(embeddings, labels, 0.1)
        assert head.last_metrics is None
        loss, _ = head.step(embeddings, labels, 0.1)
        assert head.last_metrics == head.metrics()
        assert head.last_metrics.loss == pytest.approx(loss) and head.last_metrics.updates == 2
        head.step(embeddings, labels, 0.1)
        assert head.last_metrics.updates == 2


def test_rank_0_alone_may_log():
    def run(comm):
        with make(comm=comm, metrics_every=1) as head:
            head.step(*batch(seed=comm.rank), 0.1)
            return head.last_metrics.rows if comm.rank == 0 else None

    assert on_ranks(run) == [12, None]


def test_the_defaults_are_the_librarys():
    library = names(fill({}))
    parameters = inspect.signature(partialfc.Head).parameters
    given = {name: parameters[name].default for name in FIELDS if parameters[name].default is not inspect.Parameter.empty}
    assert given == {name: value for name, value in library.items() if name in given}
    assert set(FIELDS) - set(given) == {"num_classes", "embedding_dim"}


def test_every_choice_has_its_number_back():
    for name, choices in CHOICES.items():
        for choice in choices:
            assert names(fill({name: choice}))[name] == choice


def test_a_plan_adds_up():
    plan = partialfc.plan(10_000_000, 512, ranks=64, batch=64, sample_rate=0.1)
    assert plan.weight_bytes == 4 * 512 * 156_250
    assert plan.total_bytes == plan.weight_bytes + plan.state_bytes + plan.activation_bytes + plan.probability_bytes
    messages = (plan.labels_bytes, plan.embeddings_bytes, plan.sums_bytes, plan.grad_embeddings_bytes, plan.grad_centers_bytes)
    assert plan.traffic_bytes == sum(messages) and plan.grad_embeddings_bytes == 4 * 64 * 64 * 512


def test_numbers_of_numpy():
    with partialfc.Head(np.int64(CLASSES), np.uint32(DIM), np.int32(16), sample_rate=np.float32(0.5), seed=np.uint64(3)) as head:
        head.step(*batch(), np.float32(0.1))
        assert head.top_k(batch()[0], np.int64(2))[0].shape == (6, 2)
        assert head.read_centers(np.int64(2), np.int64(3)).shape == (3, DIM)
        head.write_progress(*np.array(head.read_progress()))
        with pytest.raises(partialfc.PartialFCError, match="classes must be in the shard, 0 to 19, got 15 to 24"):
            head.read_centers(15, 10)


def test_what_is_printed(head):
    assert "20 classes x 8" in repr(head) and "cpu" in repr(head.device) and "rank 0 of 1" in repr(head.comm)


def test_a_checkpoint_goes_on_to_the_bit_and_has_plain_tensors(tmp_path):
    embeddings, labels = batch()
    told = []
    with make() as head, make() as other:
        head.step(embeddings, labels, 0.1)
        head.save(tmp_path / "kept", progress=lambda done, total: told.append((done, total)))
        weight = head.read_centers()
        other.load(tmp_path / "kept")
        assert other.read_progress() == head.read_progress() == (1, 1)
        assert other.step(embeddings, labels, 0.1)[0] == head.step(embeddings, labels, 0.1)[0]
        np.testing.assert_array_equal(other.read_centers(), head.read_centers())
    assert told[0] == (0, told[0][1]) and told[-1] == (told[0][1], 2 * weight.nbytes)
    # As the format has it: the length of the header, the header, the tensors.
    content = (tmp_path / "kept" / "rows-1-0-of-1.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])["weight"]
    first, end = entry["data_offsets"]
    assert entry["dtype"] == "F32" and entry["shape"] == [CLASSES, DIM]
    np.testing.assert_array_equal(np.frombuffer(content[8 + length + first : 8 + length + end], "<f4").reshape(CLASSES, DIM), weight)


def test_checkpoints_that_are_refused(tmp_path):
    (tmp_path / "file").write_text("no directory")
    embeddings, labels = batch()
    with make() as head:
        loss = head.forward(embeddings, labels)
        with pytest.raises(partialfc.PartialFCError, match="cannot create .*file: .*IO"):
            head.save(tmp_path / "file")
        with pytest.raises(partialfc.PartialFCError, match="cannot read .*nowhere/manifest.json: .*IO"):
            head.load(tmp_path / "nowhere")
        with pytest.raises(TypeError):
            head.save(7)
        with pytest.raises(ValueError, match="no zero byte"):
            head.save("a\0b")
        with pytest.raises(TypeError, match="progress is a int"):
            head.save(tmp_path / "kept", progress=3)
        with pytest.raises(KeyError, match="mine"):
            head.save(tmp_path / "kept", progress=lambda done, total: {}["mine"])
        with partialfc.Head(CLASSES, DIM + 1) as other:
            with pytest.raises(partialfc.PartialFCError, match=f"embedding_dim is {DIM} .* and {DIM + 1}"):
                other.load(tmp_path / "kept")
        assert head.forward(embeddings, labels) == loss
