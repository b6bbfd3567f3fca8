"""Arrays of every kind are used where they lie; what is none is refused with its name."""

import gc
import weakref

import numpy as np
import pytest

import partialfc
from partialfc._abi import pfc_matrix
from partialfc._arrays import Reader
from conftest import CLASSES, DIM, OnGpu, OnlyDlpack, batch, make


def losses(convert, convert_back=np.asarray):
    """The loss and the gradient of a step whose arrays were converted."""
    embeddings, labels = batch()
    with make() as head:
        loss, gradient = head.step(convert(embeddings), convert(labels), 0.1)
        return loss, convert_back(gradient)


@pytest.fixture(scope="module")
def expected():
    return losses(lambda array: array)


@pytest.mark.parametrize("old", [False, True])
def test_dlpack(expected, old):
    loss, gradient = losses(lambda array: OnlyDlpack(array, old))
    assert loss == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])


def test_torch(expected):
    torch = pytest.importorskip("torch")
    loss, gradient = losses(torch.from_numpy, lambda gradient: gradient.numpy())
    assert loss == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    assert isinstance(losses(torch.from_numpy, lambda gradient: gradient)[1], torch.Tensor)


def test_outputs_of_the_callers_are_written_in_place(expected):
    embeddings, labels = batch()
    out = np.zeros_like(embeddings)
    borrowed = OnlyDlpack(out)
    with make() as head:
        _, gradient = head.step(embeddings, labels, 0.1, borrowed)
    assert gradient is borrowed and borrowed.taken == 1
    np.testing.assert_array_equal(out, expected[1])


def test_the_memory_of_dlpack_is_given_back(head):
    embeddings, labels = batch()
    array = OnlyDlpack(embeddings.copy())
    alive = weakref.ref(array)
    head.forward(array, labels)
    head.backward(np.empty_like(embeddings))
    head.forward(embeddings, labels)
    del array
    gc.collect()
    assert alive() is None


def test_rows_may_lie_apart(head):
    embeddings, labels = batch()
    wide = np.zeros((6, DIM + 5), np.float32)
    wide[:, 2 : 2 + DIM] = embeddings
    loss = head.forward(embeddings, labels)
    plain = head.backward()
    out = np.zeros((6, DIM + 5), np.float32)
    assert head.forward(wide[:, 2 : 2 + DIM], labels) == loss
    head.backward(out[:, 5:])
    np.testing.assert_array_equal(out[:, 5:], plain)
    assert not out[:, :5].any()


def test_labels_of_one_column(head):
    embeddings, labels = batch()
    shape = labels[:, None].shape
    column = labels[:, None]
    assert head.forward(embeddings, column) == head.forward(embeddings, labels)
    assert column.shape == shape


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype):
    torch = pytest.importorskip("torch")
    embeddings, labels = batch()
    half = torch.from_numpy(embeddings).to(getattr(torch, dtype))
    with make() as head:
        loss, gradient = head.step(half, labels, 0.1)
        assert gradient.dtype == half.dtype
    with make() as head:
        assert head.step(half.float(), labels, 0.1)[0] == loss


def test_no_rows(head):
    assert head.step(np.empty((0, DIM), np.float32), np.empty(0, np.int64), 0.1)[1].shape == (0, DIM)


class DlpackOnGpu(OnlyDlpack):
    """Says that its memory is a GPU's, and keeps the stream that the reader names."""

    def __dlpack__(self, *, stream, **arguments):
        self.stream = stream
        return super().__dlpack__(**arguments)

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("stream", [0, 4711])
def test_a_gpus_arrays_are_read_where_they_lie(stream):
    """As a head on GPU 0 reads them; the legacy default stream is 1 in DLPack, and 0 is none."""
    reader = Reader(0, 0, stream)
    embeddings, _ = batch()
    for array, address in (
        (DlpackOnGpu(embeddings), embeddings.ctypes.data),
        (given := OnGpu((6, DIM), "<f4", stream=stream or 1), given.__cuda_array_interface__["data"][0]),
    ):
        matrix = pfc_matrix()
        assert reader.matrix(array, "embeddings", DIM, matrix) == 6
        assert (matrix.data, matrix.rows, matrix.cols, matrix.row_stride) == (address, 6, DIM, DIM)
        assert getattr(array, "stream", stream or 1) == (stream or 1)
    with pytest.raises(TypeError, match="embeddings is in the memory of GPU 0 on rank 3; this head is on GPU 1"):
        Reader(3, 1, 0).matrix(DlpackOnGpu(embeddings), "embeddings", DIM, pfc_matrix())


REFUSED = [
    (lambda e, y: (e, y.astype(np.int32)), TypeError, "labels is int32 on rank 0; it must be int64"),
    (lambda e, y: (e, y.astype(np.float32)), TypeError, "labels is float32 on rank 0"),
    (lambda e, y: (e, y.tolist()), TypeError, "labels is a list; it must be an array"),
    (lambda e, y: (e, y[:-1]), ValueError, "labels has 5 rows on rank 0; it must have 6"),
    (lambda e, y: (e, np.repeat(y, 2)[::2]), ValueError, "labels is not contiguous on rank 0"),
    (lambda e, y: (e, np.stack([y, y], 1)), ValueError, r"labels has shape \(6, 2\)"),
    (lambda e, y: (e.astype(np.float64), y), TypeError, "embeddings is float64 on rank 0; it must be float32"),
    (lambda e, y: (e.astype(">f4"), y), TypeError, "embeddings is >f4 on rank 0"),
    (lambda e, y: (np.asfortranarray(e), y), ValueError, "embeddings has rows that are not contiguous on rank 0"),
    (lambda e, y: (e[::-1], y), ValueError, "embeddings has a stride of -8 elements from row to row on rank 0"),
    (lambda e, y: (np.broadcast_to(e[:1], e.shape), y), ValueError, "a stride of 0 elements"),
    (lambda e, y: (e[:, :-1], y), ValueError, r"embeddings has shape \(6, 7\) on rank 0; it must be \(rows, 8\)"),
    (lambda e, y: (e[0], y), ValueError, r"embeddings has shape \(8,\)"),
    (lambda e, y: (None, y), TypeError, "embeddings is a NoneType; it must be an array .* on rank 0"),
    (lambda e, y: (OnGpu((6, DIM), "<f4"), y), TypeError, "embeddings is in the memory of GPU 0 on rank 0; this head is on the CPU"),
    (lambda e, y: (OnGpu((6, DIM), "<f4", stream=0), y), TypeError, "embeddings names stream 0"),
    (lambda e, y: (np.zeros((17, DIM), np.float32), np.zeros(17, np.int64)), ValueError, "17 rows on rank 0 is beyond max_batch, which is 16"),
]


@pytest.mark.parametrize(("change", "kind", "text"), REFUSED, ids=[text[:40] for _, _, text in REFUSED])
def test_refused(head, change, kind, text):
    embeddings, labels = batch()
    loss = head.forward(embeddings, labels)
    for call in (head.forward, lambda *arguments: head.step(*arguments, 0.1)):
        with pytest.raises(kind, match=text):
            call(*change(embeddings, labels))
    # It remains usable, and nothing was updated.
    assert head.forward(embeddings, labels) == loss


def test_outputs_that_cannot_be_written(head):
    embeddings, labels = batch()
    fixed = np.zeros_like(embeddings)
    fixed.flags.writeable = False
    for out in (fixed, OnlyDlpack(fixed)):
        with pytest.raises(ValueError, match="gradient is read-only on rank 0"):
            head.step(embeddings, labels, 0.1, out)
    # As inputs they serve.
    fixed_labels = labels.copy()
    fixed_labels.flags.writeable = False
    head.step(embeddings, fixed_labels, 0.1)


def test_outputs_that_need_a_gradient(head):
    torch = pytest.importorskip("torch")
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="gradient requires a gradient on rank 0"):
        head.step(embeddings, labels, 0.1, torch.zeros(embeddings.shape, requires_grad=True))
    # An input that does is read as it is.
    head.step(torch.from_numpy(embeddings).requires_grad_(), labels, 0.1)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"placement": "here"}, ValueError, "placement is 'here'; it must be 'sharded' or 'replicated'"),
        ({"scale": "64"}, TypeError, "scale is '64', a str"),
        ({"seed": -1}, ValueError, "seed is -1; it must be 0 to"),
        ({"ignore_label": 2**63}, ValueError, "ignore_label is 9223372036854775808; it must fit 64 bits"),
        ({"scale": -1.0}, partialfc.PartialFCError, "scale must be above 0 and at most 128, got -1"),
        ({"momentum": 1.0}, partialfc.PartialFCError, "momentum"),
    ],
)
def test_wrong_options(options, kind, text):
    with pytest.raises(kind, match=text):
        make(**options)


def test_an_option_that_there_is_not():
    with pytest.raises(TypeError, match="tempo"):
        make(tempo=1)
    with pytest.raises(TypeError, match="tempo is no option of a head; these are: num_classes"):
        partialfc.plan(10, 4, batch=1, tempo=1)


def test_top_k_refuses(head):
    embeddings, _ = batch()
    for k in (0, CLASSES + 1):
        with pytest.raises(ValueError, match=f"k is {k} on rank 0; it must be 1 to 20"):
            head.top_k(embeddings, k)
    with pytest.raises(TypeError, match="ids is int32"):
        head.top_k(embeddings, 2, np.empty((6, 2), np.int32))


def test_an_error_has_its_status(head):
    embeddings, labels = batch()
    labels[3] = -5
    with pytest.raises(partialfc.PartialFCError, match=r"labels\[3\] must be 0 to 19 or ignore_label, got -5") as caught:
        head.step(embeddings, labels, 0.1)
    assert (caught.value.status, caught.value.status_name, caught.value.rank) == (12, "PFC_ERROR_LABEL", 0)
    embeddings[2, 3] = np.nan
    with pytest.raises(partialfc.PartialFCError, match="NOT_FINITE"):
        head.step(embeddings, np.abs(labels), 0.1)
