"""The public losses: open_clip's, transformers', and ALBEF, BLIP-2 and SimCLR in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
import vlmfast.functional as VF
from tools.memory import peak_memory
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.verify.common import in_float64, relative_error, run
from vlmfast.verify.contrastive_loss import aligned_pairs, clip_case

BACKENDS = ["cpu", "reference"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def features(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(shape), dim=-1).to(dtype).requires_grad_()


def number(value):
    return torch.tensor(value, requires_grad=True)


def cross_entropies(logits, **options):
    labels = torch.arange(logits.shape[0])
    return sum(F.cross_entropy(x, labels, **options) for x in (logits, logits.T)) / 2


def assert_same(ours, theirs, inputs):
    """Same value and gradients, of a loss and of half of it."""
    assert ours.shape == () and ours.dtype == torch.float32
    assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    theirs = torch.autograd.grad(theirs, inputs, torch.tensor(0.5))
    for x, y in zip(torch.autograd.grad(ours, inputs, torch.tensor(0.5)), theirs, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert_close(x, y, rtol=1e-5, atol=2e-6)


# --- the losses that others have ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 77])
def test_clip_loss_is_that_of_open_clip(n, backend):
    import_torchvision()
    from open_clip.loss import ClipLoss

    inputs = (features(n, 24), features(n, 24), number(20.0), number(-1.5))
    ours = VF.clip_loss(*inputs, backend=backend)
    assert_same(ours, ClipLoss()(*inputs), inputs)
    assert_same(VF.clip_loss(*inputs[:3], backend=backend), ClipLoss()(*inputs[:3]), inputs[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 77])
def test_siglip_loss_is_that_of_open_clip(n, backend):
    import_torchvision()
    from open_clip.loss import SigLipLoss

    inputs = (features(n, 24), features(n, 24), number(10.0), number(-10.0))
    assert_same(VF.siglip_loss(*inputs, backend=backend), SigLipLoss()(*inputs), inputs)
    ours = VF.siglip_loss(*inputs[:3], None, backend=backend)
    assert_same(ours, SigLipLoss()(*inputs[:3], None), inputs[:3])


def test_clip_loss_is_that_of_transformers():
    import_torchvision()
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text, scale = inputs = (features(50, 24), features(50, 24), number(30.0))
    assert_same(VF.clip_loss(*inputs), image_text_contrastive_loss(text @ image.T * scale), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 61])
def test_ntxent_loss_is_that_of_simclr(n, backend):
    z1, z2 = torch.randn(n, 24, requires_grad=True), torch.randn(n, 24, requires_grad=True)
    temperature = number(0.2)
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    theirs = F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))
    ours = VF.ntxent_loss(z1, z2, temperature, backend=backend)
    assert_same(ours, theirs, (z1, z2, temperature))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue", [0, 90])
@pytest.mark.parametrize("alpha, label_smoothing", [(0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (0.3, 0.2)])
def test_itc_loss_is_that_of_albef(alpha, label_smoothing, queue, backend):
    n, dim = 30, 24
    image, text, scale = inputs = (features(n, dim), features(n, dim), number(1 / 0.07))
    momentum = [features(n, dim) for _ in range(2)]
    queues = [features(queue, dim) if queue else None for _ in range(2)]
    keys = [
        momentum[i].detach() if queues[i] is None else torch.cat((momentum[i], queues[i])).detach()
        for i in range(2)
    ]
    losses = []
    for x, teacher, key in ((image, momentum[0], keys[1]), (text, momentum[1], keys[0])):
        with torch.no_grad():
            hard = torch.zeros(n, key.shape[0]).fill_diagonal_(1)
            targets = alpha * (scale * teacher @ key.T).softmax(1) + (1 - alpha) * hard
        logits = scale * x @ key.T
        losses.append(F.cross_entropy(logits, targets, label_smoothing=label_smoothing))
    ours = VF.itc_loss(
        *inputs,
        image_momentum=momentum[0],
        text_momentum=momentum[1],
        image_queue=queues[0],
        text_queue=queues[1],
        alpha=alpha,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    assert_same(ours, (losses[0] + losses[1]) / 2, inputs)
    assert all(x.grad is None for x in momentum)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_itc_loss_is_that_of_blip2(label_smoothing, backend):
    image, text, scale = inputs = (features(30, 4, 24), features(30, 24), number(1 / 0.07))
    similarity = torch.matmul(image.unsqueeze(1), text.unsqueeze(-1)).squeeze(-1).max(-1).values
    theirs = cross_entropies(scale * similarity, label_smoothing=label_smoothing)
    ours = VF.itc_loss(*inputs, label_smoothing=label_smoothing, backend=backend)
    assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_itc_loss_of_queries_with_momentum_and_queues(backend):
    inputs = (features(20, 3, 16), features(20, 16), number(10.0))
    image_keys, text_keys = features(50, 3, 16).detach(), features(45, 16).detach()
    to_text = inputs[2] * (inputs[0] @ text_keys.T).max(1).values
    to_image = inputs[2] * (image_keys @ inputs[1].T).max(1).values.T
    theirs = sum(F.cross_entropy(x, torch.arange(20)) for x in (to_text, to_image)) / 2
    ours = VF.itc_loss(
        *inputs,
        image_momentum=image_keys[:20],
        image_queue=image_keys[20:],
        text_momentum=text_keys[:20],
        text_queue=text_keys[20:],
        backend=backend,
    )
    assert_same(ours, theirs, inputs)


def test_without_momentum_features_the_features_are_keys_and_teachers():
    image, text, scale = inputs = (features(30, 16), features(30, 16), number(10.0))
    logits = scale * image @ text.T
    soft = [0.4 * x.detach().softmax(1) + 0.6 * torch.eye(30) for x in (logits, logits.T)]
    theirs = (F.cross_entropy(logits, soft[0]) + F.cross_entropy(logits.T, soft[1])) / 2
    assert_same(VF.itc_loss(*inputs, alpha=0.4), theirs, inputs)


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_seed", [0, 100])
def test_near_convergence_bfloat16_is_three_times_better_than_autocast(first_seed):
    """Cosines of 0.3 to 0.9 at scale 100."""
    case = clip_case("near convergence", aligned_pairs(256, 64, 0.3, 0.9))
    inputs = case.make(torch.Generator().manual_seed(first_seed), torch.bfloat16, "cpu")
    ones = {"loss": torch.ones(())}

    def autocast(inputs):
        wide = {name: x.float() for name, x in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            logits = wide["scale"] * wide["image"] @ wide["text"].T
            return {"loss": cross_entropies(logits)}

    arguments = (case.differentiable, ones)
    truth = run(case.reference, in_float64(inputs), *arguments)
    ours = run(lambda inputs: case.kernel(inputs, "cpu"), inputs, *arguments)
    eager = run(autocast, inputs, *arguments)
    for name, exact in truth.items():
        assert 3 * relative_error(ours[name], exact) < relative_error(eager[name], exact), name


def test_converged_losses_keep_their_digits():
    """exp(-100) is far below what 1 + x or x - 1 resolve in float32, but not below float32."""
    inputs = [torch.eye(20, requires_grad=True), torch.eye(20, requires_grad=True), number(60.0)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, truth = VF.clip_loss(*inputs), VF.clip_loss(*exact)
    assert truth.item() < 1e-20
    assert_close(ours, truth.float(), rtol=1e-5, atol=0.0)
    for x, y in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, exact), strict=True
    ):
        assert_close(x, y.float(), rtol=1e-5, atol=0.0)


def test_gradients_are_only_computed_where_asked():
    """A frozen tower skips its matrix product, as locked-image tuning wants."""
    n, dim = 96, 32
    unit = 2 * n * n * dim

    def flops(*frozen):
        inputs = [features(n, dim), features(n, dim), number(10.0)]
        for i in frozen:
            inputs[i].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            VF.clip_loss(*inputs).backward()
        assert all((x.grad is None) == (i in frozen) for i, x in enumerate(inputs))
        return counter.get_total_flops()

    assert flops() == flops(2) == 4 * unit
    assert flops(0) == flops(1) == 3 * unit
    assert flops(0, 1) == 2 * unit
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        VF.clip_loss(features(n, dim), features(n, dim), 10.0)
    assert counter.get_total_flops() == unit


def test_gradients_accumulate():
    image, text, scale = features(60, 16), features(60, 16), number(10.0)
    for part in (slice(0, 30), slice(30, 60)):
        (VF.clip_loss(image[part], text[part], scale) / 2).backward()
    ours = [image.grad, text.grad, scale.grad]
    logits = [scale * image[part] @ text[part].T for part in (slice(0, 30), slice(30, 60))]
    total = sum(cross_entropies(x) for x in logits) / 2
    for x, y in zip(ours, torch.autograd.grad(total, (image, text, scale)), strict=True):
        assert_close(x, y, rtol=1e-5, atol=2e-6)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_beside_float32_scalars(dtype, backend):
    inputs = (
        features(50, 16, dtype=dtype),
        features(50, 16, dtype=dtype),
        number(9.0),
        number(-2.0),
    )
    for loss in (
        VF.clip_loss(*inputs, backend=backend),
        VF.siglip_loss(*inputs, backend=backend),
        VF.itc_loss(*inputs[:3], alpha=0.4, backend=backend) + 0.0 * inputs[3],
    ):
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, inputs)
        assert [x.dtype for x in gradients] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize(
    "scale",
    [
        20,
        20.0,
        torch.tensor(20.0),
        torch.tensor([20.0]),
        torch.tensor([[20.0]], dtype=torch.float64),
        torch.nn.Parameter(torch.tensor(20.0, dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_scales_of_any_kind(scale):
    image, text = features(20, 8), features(20, 8)
    loss = VF.clip_loss(image, text, scale)
    assert torch.equal(loss, VF.clip_loss(image, text, 20.0))
    if isinstance(scale, torch.nn.Parameter):
        loss.backward()
        assert scale.grad.dtype == scale.dtype and scale.grad.shape == scale.shape


def test_float64_runs_by_the_reference():
    inputs = [x.detach().double().requires_grad_() for x in (features(9, 8), features(9, 8))]
    assert VF.clip_loss(*inputs, 20.0).dtype == torch.float64
    assert vlmfast.explain(VF.clip_loss, *inputs, 20.0).backend == "reference"
    with pytest.raises(NotImplementedError, match="float64"):
        VF.clip_loss(*inputs, 20.0, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Features are cast; statistics and the loss are float32."""
    inputs = (features(50, 16), features(50, 16), number(30.0), number(-3.0))
    momentum = {"image_momentum": features(50, 16).detach(), "text_queue": features(9, 16).detach()}
    calls = {
        "clip": lambda x, y, s, b, backend: VF.clip_loss(x, y, s, b, backend=backend),
        "siglip": lambda x, y, s, b, backend: VF.siglip_loss(x, y, s, b, backend=backend),
        "ntxent": lambda x, y, s, b, backend: VF.ntxent_loss(x, y, backend=backend),
        "itc": lambda x, y, s, b, backend: VF.itc_loss(
            x, y, s, alpha=0.4, backend=backend, **{k: v.to(x.dtype) for k, v in momentum.items()}
        ),
    }
    rounded = [x.detach().to(dtype) for x in inputs[:2]]
    for name, loss_of in calls.items():
        for backend in BACKENDS:
            with torch.autocast("cpu", dtype):
                loss = loss_of(*inputs, backend)
            exact = loss_of(*rounded, *inputs[2:], backend)
            assert loss.dtype == torch.float32, name
            assert torch.equal(loss, exact), name
            gradients = torch.autograd.grad(loss, inputs[:2])
            assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = [x.detach().to("meta") for x in (features(5, 8), features(5, 8))]
    assert VF.clip_loss(*meta, 20.0).device.type == "meta"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(features(5, 8)) for _ in range(2)]
        assert VF.ntxent_loss(*fake).shape == ()


def test_inference_mode_and_parameters():
    with torch.inference_mode():
        assert VF.clip_loss(features(5, 8), features(5, 8), 20.0).is_inference()
    image = torch.nn.Parameter(features(5, 8).detach())
    VF.clip_loss(image, features(5, 8), 20.0).backward()
    assert image.grad is not None


def test_strided_and_expanded_features():
    wide = torch.randn(40, 3, 16)
    image, text = wide[::2, 1], wide[:20, 2, :16]
    assert torch.equal(
        VF.clip_loss(image, text, 3.0), VF.clip_loss(image.contiguous(), text.contiguous(), 3.0)
    )
    same = features(1, 16).expand(7, 16)
    assert_close(VF.clip_loss(same, same, 10.0), torch.tensor(7.0).log())


def test_vmap_over_an_argument_whose_value_is_checked():
    views, temperatures = torch.randn(2, 3, 5, 8), torch.tensor([0.2, 0.5, 0.7])
    losses = torch.vmap(VF.ntxent_loss)(*views, temperatures)
    assert torch.equal(losses, torch.stack([*map(VF.ntxent_loss, *views, temperatures)]))


def test_second_derivatives():
    inputs = (features(9, 8), features(9, 8), number(10.0))
    (gradient,) = torch.autograd.grad(VF.clip_loss(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.square().sum().backward()
    loss = VF.clip_loss(*inputs, backend="reference")
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    gradient.square().sum().backward()
    assert inputs[0].grad.isfinite().all()


X, S = torch.randn(4, 8), 10.0


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "image_features: .*tensor, got list", lambda: VF.clip_loss([X], X, S)),
        (TypeError, "text_features: .*int64", lambda: VF.clip_loss(X, X.long(), S)),
        (
            TypeError,
            "text_features: .*float32, got .*bfloat16",
            lambda: VF.clip_loss(X, X.bfloat16(), S),
        ),
        (
            ValueError,
            r"image_features: .*\(N, D\).*got \(1, 4, 8\)",
            lambda: VF.clip_loss(X[None], X, S),
        ),
        (ValueError, r"text_features: .*got \(8,\)", lambda: VF.clip_loss(X, X[0], S)),
        (ValueError, r"text_features: .*\(4, 8\), got \(3, 8\)", lambda: VF.clip_loss(X, X[:3], S)),
        (
            ValueError,
            r"text_features: .*\(4, 8\), got \(4, 7\)",
            lambda: VF.siglip_loss(X, X[:, :7], S, S),
        ),
        (ValueError, r"image_features: .*got \(0, 8\)", lambda: VF.clip_loss(X[:0], X[:0], S)),
        (
            ValueError,
            r"image_features: .*got \(4, 0\)",
            lambda: VF.clip_loss(X[:, :0], X[:, :0], S),
        ),
        (ValueError, "text_features: .*cpu, got meta", lambda: VF.clip_loss(X, X.to("meta"), S)),
        (TypeError, "logit_scale: .*got str", lambda: VF.clip_loss(X, X, "10")),
        (TypeError, "logit_scale: .*got .*int64", lambda: VF.clip_loss(X, X, torch.tensor(1))),
        (
            ValueError,
            r"logit_scale: .*one element, got \(2,\)",
            lambda: VF.clip_loss(X, X, torch.ones(2)),
        ),
        (TypeError, "logit_bias: .*got bool", lambda: VF.siglip_loss(X, X, S, True)),
        (ValueError, "temperature: .*positive.*got 0", lambda: VF.ntxent_loss(X, X, 0)),
        (ValueError, "temperature: .*got -0.5", lambda: VF.ntxent_loss(X, X, -0.5)),
        (ValueError, "temperature: .*got nan", lambda: VF.ntxent_loss(X, X, float("nan"))),
        (ValueError, "temperature: .*got -1.0", lambda: VF.ntxent_loss(X, X, torch.tensor(-1.0))),
        (ValueError, r"z2: .*\(4, 8\), got \(3, 8\)", lambda: VF.ntxent_loss(X, X[:3])),
        (ValueError, "logit_scale: expected a finite number", lambda: VF.clip_loss(X, X, 1e39)),
        (
            ValueError,
            "logit_scale: .*got 1e.39",
            lambda: VF.itc_loss(X, X, torch.tensor(1e39, dtype=torch.float64)),
        ),
        (ValueError, "logit_bias: expected a finite", lambda: VF.siglip_loss(X, X, S, 10**400)),
        (ValueError, "temperature: .*reciprocal", lambda: VF.ntxent_loss(X, X, 1e-60)),
        (
            TypeError,
            "logit_scale: .*strided",
            lambda: VF.clip_loss(X, X, torch.ones(1).to_sparse()),
        ),
        (TypeError, "local_loss: .*got str", lambda: VF.clip_loss(X, X, S, local_loss="yes")),
        (ValueError, "alpha: .*got 1.5", lambda: VF.itc_loss(X, X, S, alpha=1.5)),
        (TypeError, "alpha: .*got str", lambda: VF.itc_loss(X, X, S, alpha="1")),
        (
            ValueError,
            "label_smoothing: .*got -0.1",
            lambda: VF.itc_loss(X, X, S, label_smoothing=-0.1),
        ),
        (ValueError, "alpha: .*several queries", lambda: VF.itc_loss(X[:, None], X, S, alpha=0.4)),
        (ValueError, r"text_features: .*\(4, 8\), got \(3, 8\)", lambda: VF.itc_loss(X, X[:3], S)),
        (ValueError, "image_momentum: .*got", lambda: VF.itc_loss(X, X, S, image_momentum=X[:3])),
        (ValueError, "text_queue: .*got", lambda: VF.itc_loss(X, X, S, text_queue=X[:, :5])),
        (ValueError, "image_queue: .*got", lambda: VF.itc_loss(X[:, None], X, S, image_queue=X)),
        (
            TypeError,
            "image_queue: .*got .*float64",
            lambda: VF.itc_loss(X, X, S, image_queue=X.double()),
        ),
        (ValueError, "backend: .*got 'gpu'", lambda: VF.clip_loss(X, X, S, backend="gpu")),
        (NotImplementedError, "TRITON_INTERPRET", lambda: VF.clip_loss(X, X, S, backend="triton")),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- compilation --------------------------------------------------------------------------------


def clip(image, text, scale, bias):
    return VF.clip_loss(image, text, scale.exp(), bias)


def siglip(image, text, scale, bias):
    return VF.siglip_loss(image, text, scale.exp(), bias)


def ntxent(image, text, scale, bias):
    return VF.ntxent_loss(image, text, scale.exp()) + 0.0 * bias


def itc(image, text, scale, bias):
    return VF.itc_loss(image, text, scale.exp(), alpha=0.4, label_smoothing=0.1) + 0.0 * bias


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", [clip, siglip, ntxent, itc], ids=lambda f: f.__name__)
def test_compile_without_graph_breaks(loss, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33):
        inputs = (features(n, 16), features(n, 16), number(1.0), number(-1.0))
        assert_same(compiled(*inputs), loss(*inputs), inputs)


def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = (features(20, 16), features(20, 16), number(1.0), number(-1.0))
    assert_same(torch.compile(clip, fullgraph=True)(*inputs), clip(*inputs), inputs)


MEMORY_SETUP = """
import torch
import vlmfast.functional as VF

def features(n):
    return torch.randn(n, 96).mul_(0.1).bfloat16().requires_grad_()

VF.clip_loss(features(300), features(300), torch.tensor(10.0, requires_grad=True)).backward()
image, text = features(32768), features(32768)
for tensor in (image, text):
    tensor.grad = torch.zeros_like(tensor)
scale = torch.tensor(10.0, requires_grad=True)
"""


def test_memory_of_a_large_batch():
    """N = 32768, D = 96: a matrix of bytes alone would be 1 GiB. Beside the two gradients, of 6 MiB
    each, columns are summed in float32, 12 MiB; statistics are vectors of 128 KiB."""
    assert (
        peak_memory(MEMORY_SETUP, "VF.clip_loss(image, text, scale).backward()") < 2 * 6 + 12 + 16
    )
