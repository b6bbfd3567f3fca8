// Trains a small convolutional network of LibTorch under a head, which is a function of autograd.
// The README beside this file says how to build and run it; --check compares the head with the same
// loss in plain LibTorch.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <partialfc.hpp>

namespace {

using torch::Tensor;
namespace F = torch::nn::functional;

constexpr std::int64_t kSide = 32, kDim = 128;

//--------------------------------------------------------------------------------------------------
// The head.

// Where the rows of a tensor are.
partialfc::matrix rows(const Tensor &tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(tensor.dim() == 2 && tensor.stride(1) == 1 && tensor.device().is_cpu(),
              "a matrix of contiguous rows in host memory is wanted");
  TORCH_CHECK(type == torch::kFloat || type == torch::kHalf || type == torch::kBFloat16,
              "float, half or bfloat16 is wanted, not ", type);
  return {tensor.data_ptr(),
          type == torch::kFloat ? PFC_F32 : type == torch::kHalf ? PFC_F16 : PFC_BF16,
          static_cast<std::uint64_t>(tensor.size(0)), static_cast<std::uint64_t>(tensor.size(1)),
          static_cast<std::uint64_t>(tensor.stride(0))};
}

partialfc::labels classes(const Tensor &labels) {
  return {labels.data_ptr<std::int64_t>(), static_cast<std::uint64_t>(labels.numel())};
}

// The loss of a head, as a function of the embeddings. What fails in it is thrown where the
// program calls it: from Loss::apply, or from backward().
struct Loss : torch::autograd::Function<Loss> {
  static Tensor forward(torch::autograd::AutogradContext *context, const Tensor &embeddings,
                        const Tensor &labels, partialfc::head *head) {
    const Tensor contiguous = embeddings.contiguous();
    context->saved_data["head"] = reinterpret_cast<std::int64_t>(head);
    context->saved_data["like"] = contiguous;
    return torch::tensor(head->forward(rows(contiguous), classes(labels)),
                         torch::TensorOptions().dtype(torch::kDouble));
  }

  // The weight of the loss counts for the class centers too, which the head itself updates.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *context,
                                                 torch::autograd::variable_list weight) {
    auto *head = reinterpret_cast<partialfc::head *>(context->saved_data["head"].toInt());
    const Tensor gradient = torch::empty_like(context->saved_data["like"].toTensor());
    head->backward(weight[0].item<double>(), 1.0, rows(gradient));
    return {gradient, Tensor(), Tensor()};
  }
};

//--------------------------------------------------------------------------------------------------
// The data.

struct Batch {
  Tensor images, labels;
};

// Images of `glyphs --export`, or ones that are made up: for each class a picture, with spots.
class Glyphs {
 public:
  explicit Glyphs(std::int64_t classes) : classes_(classes) {
    const Tensor coarse = (torch::rand({classes, 1, 8, 8}) > 0.5).to(torch::kFloat);
    const std::vector<std::int64_t> size{kSide, kSide};
    pictures_ = F::interpolate(coarse, F::InterpolateFuncOptions().size(size));
    held_out_ = made_up(500);
  }

  explicit Glyphs(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> raw{std::istreambuf_iterator<char>(file), {}};
    std::uint64_t numbers[4];  // classes, pixels, images for training, held-out images
    if (raw.size() < 40 || std::memcmp(raw.data(), "pfcimage", 8) != 0)
      throw std::runtime_error(path + " is no file of glyphs --export");
    std::memcpy(numbers, raw.data() + 8, sizeof numbers);
    const auto [classes, pixels, training, held_out] = numbers;
    const std::uint64_t count = training + held_out;
    if (pixels != kSide * kSide || (raw.size() - 40) / (8 + pixels) != count)
      throw std::runtime_error(path + " has another number of pixels than it says");
    classes_ = static_cast<std::int64_t>(classes);
    const auto size = static_cast<std::int64_t>(count), split = static_cast<std::int64_t>(training);
    char *first = raw.data() + 40;
    const Tensor labels = torch::from_blob(first, {size}, torch::kLong).clone();
    const Tensor ink = torch::from_blob(first + 8 * count, {size, 1, kSide, kSide}, torch::kByte);
    const Tensor images = ink.to(torch::kFloat) / 255;
    training_ = {images.slice(0, 0, split), labels.slice(0, 0, split)};
    held_out_ = {images.slice(0, split), labels.slice(0, split)};
  }

  std::int64_t classes() const { return classes_; }
  const Batch &held_out() const { return held_out_; }

  // Images moved by up to two pixels.
  Batch batch(std::int64_t count) const {
    Batch batch = pictures_.defined() ? made_up(count) : Batch{};
    if (!pictures_.defined()) {
      const Tensor chosen = torch::randint(training_.labels.size(0), {count}, torch::kLong);
      batch = {training_.images.index_select(0, chosen), training_.labels.index_select(0, chosen)};
    }
    const Tensor moves = torch::randint(-2, 3, {2}, torch::kLong);
    const auto down = moves[0].item<std::int64_t>(), right = moves[1].item<std::int64_t>();
    batch.images = batch.images.roll({down, right}, {2, 3});
    return batch;
  }

 private:
  Batch made_up(std::int64_t count) const {
    const Tensor labels = torch::randint(classes_, {count}, torch::kLong);
    const Tensor spots = 0.5 * torch::randn({count, 1, kSide, kSide});
    return {pictures_.index_select(0, labels) + spots, labels};
  }

  std::int64_t classes_ = 0;
  Tensor pictures_;
  Batch training_, held_out_;
};

//--------------------------------------------------------------------------------------------------
// Training.

constexpr char kOptions[] = "--check, --data, --classes, --steps, --batch, --rate and --lr";

struct Settings {
  std::string data;
  std::int64_t classes = 200, steps = 60, batch = 128;
  double rate = 0.5, learning_rate = 0.1;
};

torch::nn::Sequential network() {
  torch::nn::Sequential layers;
  std::int64_t inputs = 1;
  for (const std::int64_t outputs : {16, 32, 64}) {
    const auto convolution = torch::nn::Conv2dOptions(inputs, outputs, 3).stride(2).padding(1);
    layers->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(convolution).bias(false)));
    layers->push_back(torch::nn::BatchNorm2d(outputs));
    layers->push_back(torch::nn::ReLU());
    inputs = outputs;
  }
  layers->push_back(torch::nn::Flatten());
  layers->push_back(torch::nn::Linear(64 * 16, kDim));
  layers->push_back(torch::nn::BatchNorm1d(kDim));
  return layers;
}

partialfc::head_options options(std::int64_t classes, std::int64_t dim) {
  partialfc::head_options options;
  options.num_classes = static_cast<std::uint64_t>(classes);
  options.embedding_dim = static_cast<std::uint32_t>(dim);
  options.scale = 32;
  options.m2 = 0.3;
  return options;
}

void train(const Settings &settings) {
  torch::manual_seed(0);
  const Glyphs data = settings.data.empty() ? Glyphs(settings.classes) : Glyphs(settings.data);
  partialfc::head_options chosen = options(data.classes(), kDim);
  chosen.sample_rate = settings.rate;
  partialfc::head head(partialfc::device::cpu(), partialfc::comm::self(), chosen);
  torch::nn::Sequential backbone = network();
  auto sgd = torch::optim::SGDOptions(settings.learning_rate);
  sgd.momentum(0.9).weight_decay(5e-4);
  torch::optim::SGD optimizer(backbone->parameters(), sgd);

  auto reported = std::chrono::steady_clock::now();
  std::int64_t images = 0;
  for (std::int64_t step = 0; step < settings.steps; step++) {
    const double left = 1.0 - static_cast<double>(step) / static_cast<double>(settings.steps);
    const double learning_rate = settings.learning_rate * left;
    optimizer.param_groups()[0].options().set_lr(learning_rate);

    const Batch batch = data.batch(settings.batch);
    optimizer.zero_grad();
    const Tensor loss = Loss::apply(backbone->forward(batch.images), batch.labels, &head);
    loss.backward();
    torch::nn::utils::clip_grad_norm_(backbone->parameters(), 5.0);
    optimizer.step();
    head.update(learning_rate);

    images += settings.batch;
    if (step % 20 == 0 || step + 1 == settings.steps) {
      const auto now = std::chrono::steady_clock::now();
      const double seconds = std::chrono::duration<double>(now - reported).count();
      const partialfc::metrics metrics = head.last_metrics();
      std::printf("step %3lld  loss %.3f  top-1 %.2f  target cosine %.2f  %.0f images/s\n",
                  static_cast<long long>(step), metrics.loss, metrics.top1,
                  metrics.mean_target_cosine, static_cast<double>(images) / seconds);
      std::fflush(stdout);
      reported = now;
      images = 0;
    }
  }

  // The nearest class center of images that the network has not seen.
  backbone->eval();
  const torch::NoGradGuard no_gradient;
  const auto &[held_out, labels] = data.held_out();
  const Tensor embeddings = backbone->forward(held_out).contiguous();
  std::vector<std::int64_t> nearest(static_cast<std::size_t>(labels.numel()));
  std::vector<float> cosines(nearest.size());
  head.top_k(rows(embeddings), 1, nearest, cosines);
  const Tensor found = torch::from_blob(nearest.data(), {labels.numel()}, torch::kLong);
  const double right = found.eq(labels).to(torch::kDouble).mean().item<double>();
  std::printf("%lld classes, %lld held-out images, %.1f %% recognized\n",
              static_cast<long long>(data.classes()), static_cast<long long>(labels.numel()),
              100 * right);
}

//--------------------------------------------------------------------------------------------------
// The same loss in plain LibTorch.

// ArcFace over all classes, in the tensors' own precision.
Tensor plain_loss(const Tensor &embeddings, const Tensor &centers, const Tensor &labels,
                  const pfc_head_options &options) {
  const auto by_row = F::NormalizeFuncOptions().dim(1);
  const Tensor cosines = F::normalize(embeddings, by_row).mm(F::normalize(centers, by_row).t());
  const Tensor column = labels.unsqueeze(1);
  const Tensor target = (cosines.gather(1, column).acos() + options.m2).cos();
  return F::cross_entropy(options.scale * cosines.scatter(1, column, target), labels);
}

double difference(const char *what, const Tensor &ours, const Tensor &plain) {
  const double most = (ours.to(torch::kDouble) - plain).abs().max().item<double>();
  const double share = most / plain.abs().max().item<double>();
  std::printf("%-12s differs from plain LibTorch's by %.1e of its largest number\n", what, share);
  return share;
}

// Whether loss, gradient and update are what plain LibTorch gives in float64.
bool check() {
  torch::manual_seed(1);
  constexpr std::int64_t classes = 50, dim = 24, batch = 16;
  constexpr double weight = 0.25, learning_rate = 0.5;
  partialfc::head_options chosen = options(classes, dim);
  chosen.momentum = 0;
  chosen.weight_decay = 0;
  partialfc::head head(partialfc::device::cpu(), partialfc::comm::self(), chosen);
  const Tensor start = torch::randn({classes, dim}), inputs = torch::randn({batch, dim});
  const Tensor labels = torch::randint(classes, {batch}, torch::kLong);
  head.write_centers(0, rows(start));

  // Something of autograd before the head, and behind it.
  const Tensor ours = inputs.clone().requires_grad_();
  const Tensor loss = Loss::apply(ours.tanh(), labels, &head);
  (weight * loss).backward();
  head.update(learning_rate);
  const Tensor updated = torch::empty_like(start);
  head.read_centers(0, rows(updated));

  const Tensor plain = inputs.to(torch::kDouble).requires_grad_();
  const Tensor centers = start.to(torch::kDouble).requires_grad_();
  const Tensor plain_value = plain_loss(plain.tanh(), centers, labels, chosen);
  (weight * plain_value).backward();

  double most = difference("the loss", loss.detach(), plain_value.detach());
  most = std::max(most, difference("the gradient", ours.grad(), plain.grad()));
  const Tensor change = updated.to(torch::kDouble) - start.to(torch::kDouble);
  most = std::max(most, difference("the update", change, -learning_rate * centers.grad()));
  return most < 1e-4;
}

template <class Number>
void read(const std::string &name, const std::string &text, Number &number) {
  std::istringstream stream(text);
  if (!(stream >> number) || stream.peek() != std::istringstream::traits_type::eof())
    throw std::invalid_argument(name + " must be a number, got " + text);
}

Settings settings_of(int argc, char **argv) {
  Settings settings;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc)
      throw std::invalid_argument(name + " needs a value, or is none of " + kOptions);
    const std::string value = argv[i + 1];
    if (name == "--data") settings.data = value;
    else if (name == "--classes") read(name, value, settings.classes);
    else if (name == "--steps") read(name, value, settings.steps);
    else if (name == "--batch") read(name, value, settings.batch);
    else if (name == "--rate") read(name, value, settings.rate);
    else if (name == "--lr") read(name, value, settings.learning_rate);
    else throw std::invalid_argument(name + " is none of " + kOptions);
  }
  return settings;
}

}  // namespace

int main(int argc, char **argv) {
  try {
    if (argc == 2 && std::string(argv[1]) == "--check") return check() ? 0 : 1;
    train(settings_of(argc, argv));
    return 0;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
