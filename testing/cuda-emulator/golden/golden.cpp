// Runs one tiny kernel for each wrapper of kernels/ptx on a device, and keeps what came out, or
// compares it with what was kept: the hardware's answers, which the emulator's models are then held
// to.
//
//   golden [--driver PATH] [--images DIR] [--seed N] [--schedule N] --write DIR [--date D]
//   golden [--driver PATH] [--images DIR] [--seed N] [--schedule N] --compare DIR
//
//   --driver     the driver's library: libcuda.so.1 unless told; or the emulator's
//   --images     DIR/golden.cubin has the kernels for a GPU; the emulator has them in its library
//   --seed       of the inputs: 1 unless told; a comparison takes that of the file
//   --schedule   of the emulator alone: in which order it takes blocks, warps and threads
//   --date       for the files' heads; today's unless told
//
// To keep a GPU's answers, on a machine that has it, from the root of the sources:
//
//   make -C testing/cuda-emulator OUT=$PWD/out/cuda-emulator golden
//   nvcc -std=c++17 -arch=sm_90a -cubin -Ikernels testing/cuda-emulator/golden/kernels.cu -o out/golden.cubin
//   out/cuda-emulator/golden --images out --write testing/cuda-emulator/golden/outputs
//
// and commit testing/cuda-emulator/golden/outputs. `make check` then compares the emulator with it. What the
// emulator wrote is never kept there: it would compare the models with themselves.
//
// Ends with 0 where all is well, 1 where outputs differ or a call failed, 2 where it was not asked
// properly. Needs nothing but the C library and the driver.
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "cases.h"
#include "cuda_api.h"

namespace {

[[noreturn, gnu::format(printf, 2, 3)]] void stop(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("golden: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(status);
}

// The driver, by its exported names alone.
struct Driver {
    explicit Driver(const char* path) {
        handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
        if (!handle) stop(1, "no driver: %s", dlerror());
        simt_seed = reinterpret_cast<void (*)(uint64_t)>(dlsym(handle, "simt_seed"));
    }

    template <class F>
    F* named(const char* name, F*) const {
        void* found = dlsym(handle, name);
        if (!found) stop(1, "the driver has no %s", name);
        return reinterpret_cast<F*>(found);
    }

    bool is_emulator() const { return simt_seed != nullptr; }

    void* handle;
    void (*simt_seed)(uint64_t);
};

const Driver* driver;

// The driver's function of that name, and a call of it that must succeed.
#define DRIVER(function) (driver->named(#function, decltype(&function)(nullptr)))
#define MUST(function, ...) must(#function, DRIVER(function)(__VA_ARGS__))

void must(const char* function, CUresult result) {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    DRIVER(cuGetErrorName)(result, &name);
    stop(1, "%s gives %d, %s", function, result, name ? name : "which has no name");
}

struct Device {
    char name[256];
    int major, minor, version;
};

Device open_device() {
    Device device{};
    CUdevice first;
    CUcontext context;
    MUST(cuInit, 0);
    MUST(cuDeviceGet, &first, 0);
    MUST(cuDeviceGetName, device.name, int(sizeof device.name), first);
    MUST(cuDeviceGetAttribute, &device.major, 75, first);
    MUST(cuDeviceGetAttribute, &device.minor, 76, first);
    MUST(cuDriverGetVersion, &device.version);
    MUST(cuDevicePrimaryCtxRetain, &context, first);
    MUST(cuCtxSetCurrent, context);
    return device;
}

std::string read_file(const std::string& path) {
    FILE* file = fopen(path.c_str(), "rb");
    if (!file) stop(1, "%s: %s", path.c_str(), strerror(errno));
    std::string text;
    char part[4096];
    for (size_t size; (size = fread(part, 1, sizeof part, file)) > 0;) text.append(part, size);
    if (ferror(file)) stop(1, "%s: %s", path.c_str(), strerror(errno));
    fclose(file);
    return text;
}

CUmodule load_image(const char* folder) {
    std::string image;
    if (folder) image = read_file(std::string(folder) + "/golden.cubin");
    else if (!driver->is_emulator()) stop(2, "--images DIR is needed on a GPU");
    CUmodule module;
    MUST(cuModuleLoadData, &module, image.data());
    return module;
}

std::vector<uint32_t> run_case(CUmodule module, const Case& c) {
    CUfunction function;
    CUdeviceptr in, out;
    std::vector<uint32_t> outputs(c.initial.size());
    const size_t in_bytes = 4 * c.inputs.size(), out_bytes = 4 * outputs.size();
    must(c.kernel.c_str(), DRIVER(cuModuleGetFunction)(&function, module, c.kernel.c_str()));
    MUST(cuMemAlloc_v2, &in, in_bytes);
    MUST(cuMemAlloc_v2, &out, out_bytes);
    MUST(cuMemcpyHtoD_v2, in, c.inputs.data(), in_bytes);
    MUST(cuMemcpyHtoD_v2, out, c.initial.data(), out_bytes);
    void* parameters[] = {&in, &out};
    must(c.kernel.c_str(), DRIVER(cuLaunchKernel)(function, c.grid, 1, 1, c.block, 1, 1, c.shared,
                                                  nullptr, parameters, nullptr));
    must(c.kernel.c_str(), DRIVER(cuCtxSynchronize)());
    MUST(cuMemcpyDtoH_v2, outputs.data(), out, out_bytes);
    MUST(cuMemFree_v2, in);
    MUST(cuMemFree_v2, out);
    return outputs;
}

// A file is lines of a word and its value, up to `words` and their number, and then the words in
// hexadecimal.
struct Kept {
    std::string device, capability, driver, date, inputs;
    uint64_t seed = 0;
    std::vector<uint32_t> words;
};

std::string path_of(const std::string& folder, const std::string& name) {
    return folder + "/" + name + ".txt";
}

// Tells outputs of other inputs from outputs that differ.
std::string fingerprint(const Case& c) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (const auto* words : {&c.inputs, &c.initial})
        for (uint32_t word : *words) hash = (hash ^ word) * 0x100000001b3u;
    char text[20];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)hash);
    return text;
}

void write_kept(const std::string& path, const Kept& kept) {
    FILE* file = fopen(path.c_str(), "w");
    if (!file) stop(1, "%s: %s", path.c_str(), strerror(errno));
    fprintf(file, "device %s\ncapability %s\ndriver %s\ndate %s\nseed %llu\ninputs %s\nwords %zu\n",
            kept.device.c_str(), kept.capability.c_str(), kept.driver.c_str(), kept.date.c_str(),
            (unsigned long long)kept.seed, kept.inputs.c_str(), kept.words.size());
    for (size_t i = 0; i < kept.words.size(); ++i)
        fprintf(file, "%08x%c", kept.words[i],
                i % 12 == 11 || i + 1 == kept.words.size() ? '\n' : ' ');
    const bool written = !ferror(file);
    if (fclose(file) != 0 || !written) stop(1, "%s: %s", path.c_str(), strerror(errno));
}

Kept read_kept(const std::string& path) {
    const std::string text = read_file(path);
    Kept kept;
    size_t at = 0, count = 0;
    const auto take = [&](const char* word) {
        const std::string wanted = std::string(word) + " ";
        const size_t end = text.find('\n', at);
        if (text.compare(at, wanted.size(), wanted) != 0 || end == std::string::npos)
            stop(1, "%s: there is no line `%s` where it should be", path.c_str(), word);
        const std::string value = text.substr(at + wanted.size(), end - at - wanted.size());
        at = end + 1;
        return value;
    };
    kept.device = take("device");
    kept.capability = take("capability");
    kept.driver = take("driver");
    kept.date = take("date");
    kept.seed = strtoull(take("seed").c_str(), nullptr, 10);
    kept.inputs = take("inputs");
    count = strtoull(take("words").c_str(), nullptr, 10);
    for (const char* from = text.c_str() + at; *from != 0;) {
        if (strspn(from, "0123456789abcdef") != 8 || (from[8] != ' ' && from[8] != '\n'))
            stop(1, "%s: word %zu is not 8 hexadecimal digits", path.c_str(), kept.words.size());
        kept.words.push_back(uint32_t(strtoul(from, nullptr, 16)));
        from += 9;
    }
    if (kept.words.size() != count)
        stop(1, "%s: %zu words, but its head says %zu", path.c_str(), kept.words.size(), count);
    return kept;
}

// The names of the files, without .txt.
std::vector<std::string> list(const char* folder) {
    DIR* opened = opendir(folder);
    if (!opened) stop(1, "%s: %s", folder, strerror(errno));
    std::vector<std::string> names;
    while (const dirent* entry = readdir(opened)) {
        const std::string name = entry->d_name;
        if (name == "." || name == "..") continue;
        const bool text = name.size() > 4 && name.compare(name.size() - 4, 4, ".txt") == 0;
        names.push_back(text ? name.substr(0, name.size() - 4) : name);
    }
    closedir(opened);
    return names;
}

// "3f800000 (1)"; a double with both its words.
std::string shown(const Case& c, const std::vector<uint32_t>& words, size_t i) {
    char text[64];
    if (c.judgement == Judgement::kBits) {
        snprintf(text, sizeof text, "%08x", words[i]);
    } else if (c.judgement == Judgement::kDoubles) {
        double v;
        memcpy(&v, &words[i / 2 * 2], 8);
        snprintf(text, sizeof text, "%08x (%.17g)", words[i], v);
    } else {
        float v;
        memcpy(&v, &words[i], 4);
        snprintf(text, sizeof text, "%08x (%.9g)", words[i], double(v));
    }
    return text;
}

// How many words differ; tells of the first few.
size_t compare(const Case& c, const std::vector<uint32_t>& now, const Kept& kept) {
    constexpr size_t kTold = 4;
    size_t differ = 0;
    for (size_t i = 0; i < now.size(); ++i) {
        if (agrees(c, now, kept.words, i)) continue;
        if (++differ > kTold) continue;
        printf("%s[%zu]: %s here, %s kept", c.name.c_str(), i, shown(c, now, i).c_str(),
               shown(c, kept.words, i).c_str());
        if (c.judgement == Judgement::kBounds) printf(", more than %.3g apart", c.bounds[i]);
        if (c.judgement == Judgement::kUlps) printf(", more than 2 units in the last place apart");
        printf("\n");
    }
    if (differ > 0)
        printf("%s: %zu of %zu words differ from those of %s (%s, driver %s, %s)\n",
               c.name.c_str(), differ, now.size(), kept.device.c_str(), kept.capability.c_str(),
               kept.driver.c_str(), kept.date.c_str());
    return differ;
}

void write_all(const Device& device, CUmodule module, const char* folder, uint64_t seed,
               const char* date) {
    if (mkdir(folder, 0777) != 0 && errno != EEXIST) stop(1, "%s: %s", folder, strerror(errno));
    Kept kept;
    kept.device = device.name;
    kept.capability = std::to_string(device.major) + "." + std::to_string(device.minor);
    kept.driver = std::to_string(device.version);
    kept.seed = seed;
    if (date) {
        kept.date = date;
    } else {
        char today[16];
        const time_t now = time(nullptr);
        strftime(today, sizeof today, "%Y-%m-%d", gmtime(&now));
        kept.date = today;
    }
    const auto cases = make_cases(seed);
    for (const Case& c : cases) {
        kept.words = run_case(module, c);
        kept.inputs = fingerprint(c);
        write_kept(path_of(folder, c.name), kept);
    }
    printf("%zu wrappers' outputs of %s are in %s\n", cases.size(), device.name, folder);
}

int compare_all(const Device& device, CUmodule module, const char* folder, const char* seed) {
    std::vector<std::string> names = list(folder);
    uint64_t made_for = seed ? strtoull(seed, nullptr, 10) : 1;
    auto cases = make_cases(made_for);
    size_t wrong = 0, words = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
        const std::string name = cases[i].name, path = path_of(folder, name);
        size_t found = 0;
        while (found < names.size() && names[found] != name) ++found;
        if (found == names.size()) {
            printf("%s: there is no %s\n", name.c_str(), path.c_str());
            ++wrong;
            continue;
        }
        names.erase(names.begin() + long(found));
        const Kept kept = read_kept(path);
        if (kept.seed != made_for) {
            if (seed) stop(2, "--seed %s, but %s is of seed %llu", seed, path.c_str(),
                           (unsigned long long)kept.seed);
            made_for = kept.seed;
            cases = make_cases(made_for);
        }
        const Case& c = cases[i];
        if (kept.inputs != fingerprint(c) || kept.words.size() != c.initial.size()) {
            printf("%s: %s is of other inputs than are made now: it has to be written again\n",
                   name.c_str(), path.c_str());
            ++wrong;
            continue;
        }
        if (compare(c, run_case(module, c), kept) > 0) ++wrong;
        words += kept.words.size();
    }
    for (const std::string& name : names) {
        printf("%s: there is no such wrapper\n", name.c_str());
        ++wrong;
    }
    printf("%s against %s: %zu wrappers, %zu words; %zu wrappers differ\n", device.name, folder,
           cases.size(), words, wrong);
    return wrong > 0;
}

}  // namespace

int main(int count, char** arguments) {
    const char *path = nullptr, *images = nullptr, *write = nullptr, *compared = nullptr,
               *seed = nullptr, *schedule = nullptr, *date = nullptr;
    const struct {
        const char* name;
        const char** value;
    } options[] = {{"--driver", &path},    {"--images", &images}, {"--write", &write},
                   {"--compare", &compared}, {"--seed", &seed},   {"--schedule", &schedule},
                   {"--date", &date}};
    for (int i = 1; i < count; i += 2) {
        const char** value = nullptr;
        for (const auto& option : options)
            if (strcmp(arguments[i], option.name) == 0) value = option.value;
        if (!value) stop(2, "there is no option %s", arguments[i]);
        if (i + 1 == count) stop(2, "%s needs a value", arguments[i]);
        *value = arguments[i + 1];
    }
    if ((write != nullptr) == (compared != nullptr)) stop(2, "--write DIR or --compare DIR, one");
    if (date && !write) stop(2, "--date goes with --write");
    for (const char* number : {seed, schedule}) {
        if (number && (*number == 0 || strspn(number, "0123456789") != strlen(number)))
            stop(2, "%s is no number", number);
    }

    const Driver opened(path ? path : "libcuda.so.1");
    driver = &opened;
    if (schedule) {
        if (!driver->is_emulator()) stop(2, "--schedule is the emulator's alone");
        driver->simt_seed(strtoull(schedule, nullptr, 10));
    }
    const Device device = open_device();
    const CUmodule module = load_image(images);
    if (compared) return compare_all(device, module, compared, seed);
    write_all(device, module, write, seed ? strtoull(seed, nullptr, 10) : 1, date);
    return 0;
}
