// Loads or saves a checkpoint, or makes a step or other classes with the rows in a file, while the disk
// misbehaves at one call of the system, chosen by its number. tests/hostile/disk.rs goes through all of them and
// looks at what is left.
//
//   disk_faults DIRECTORY load|save|beside|step|classes FAULT NUMBER
//
// loads the checkpoint, makes one step, and saves it to the same directory; with NUMBER 0 nothing
// fails. beside: the same, and makes another step while it saves. step: a head with its rows in DIRECTORY/rows makes two steps and saves. classes: the same, and
// between the two it is given fewer classes. FAULT is what becomes of the NUMBER-th call of the load,
// of the save, of the second step or of the change of classes: killed (the
// process, before the call), half (a write writes half of its bytes, then the process is killed),
// full (ENOSPC), broken (EIO), interrupted (EINTR), indirect (EINVAL, as of a file system that finds
// late that it cannot transfer directly), short (less is read or written, as may be).
//
// Prints how many calls there were, the status of the load, save or step and its text, and the
// function of that call. Exits with 0 if the head makes another step afterwards, or cannot after a
// load or a write that failed; with 77 where it was killed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <partialfc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CLASSES = 1500, FEWER = 400, DIM = 512, BATCH = 4, KILLED = 77 };

enum { MOST_FILES = 1024 };
// Descriptors of files that are not on a disk.
static char of_the_system[MOST_FILES];

static const char *fault = "";
static long number, calls;
static int armed;
// The function of that call.
static const char *hit = "";

// Whether this is the call. A process that is to be killed ends here.
static int is_it(const char *function, int writes) {
  // Rows move on several threads.
  if (!armed || __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) != number) return 0;
  hit = function;
  if (strcmp(fault, "killed") == 0 || (strcmp(fault, "half") == 0 && !writes)) _exit(KILLED);
  return 1;
}
// Sets errno of a call that fails; 0: it does not fail.
static int fails(void) {
  errno = strcmp(fault, "full") == 0          ? ENOSPC
          : strcmp(fault, "broken") == 0      ? EIO
          : strcmp(fault, "interrupted") == 0 ? EINTR
          : strcmp(fault, "indirect") == 0    ? EINVAL
                                              : 0;
  return errno != 0;
}

// The C library's own function of this name.
#define REAL(type, name, ...)     \
  type (*real)(__VA_ARGS__);      \
  *(void **)&real = dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *bytes, size_t count) {
  REAL(ssize_t, "write", int, const void *, size_t);
  // What this program prints goes through.
  if (fd <= 2 || !is_it("write", 1)) return real(fd, bytes, count);
  if (fails()) return -1;
  ssize_t written = real(fd, bytes, count / 2);
  if (strcmp(fault, "half") == 0) _exit(KILLED);
  return written;
}
ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
  REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
  const int direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
  if (!is_it(direct ? "pwrite64, direct" : "pwrite64", 1)) return real(fd, bytes, count, at);
  if (fails()) return -1;
  // Half of a direct write may be less than a sector, and would be refused.
  if (strcmp(fault, "short") == 0) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_DIRECT);
  ssize_t written = real(fd, bytes, count / 2, at);
  if (strcmp(fault, "half") == 0) _exit(KILLED);
  return written;
}
ssize_t read(int fd, void *bytes, size_t count) {
  REAL(ssize_t, "read", int, void *, size_t);
  if (fd >= 0 && fd < MOST_FILES && of_the_system[fd]) return real(fd, bytes, count);
  if (!is_it("read", 0)) return real(fd, bytes, count);
  if (fails()) return -1;
  return real(fd, bytes, count > 1 ? count / 2 : count);
}
ssize_t pread64(int fd, void *bytes, size_t count, off64_t at) {
  REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
  if (!is_it("pread64", 0)) return real(fd, bytes, count, at);
  if (fails()) return -1;
  // Not a whole number of sectors.
  ssize_t got = real(fd, bytes, count, at);
  return got > 100 ? got - 100 : got;
}
int fallocate64(int fd, int mode, off64_t at, off64_t count) {
  REAL(int, "fallocate64", int, int, off64_t, off64_t);
  return is_it("fallocate64", 0) && fails() ? -1 : real(fd, mode, at, count);
}
int fallocate(int fd, int mode, off_t at, off_t count) { return fallocate64(fd, mode, at, count); }
int fsync(int fd) {
  REAL(int, "fsync", int);
  return is_it("fsync", 0) && fails() ? -1 : real(fd);
}
int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  return is_it("rename", 0) && fails() ? -1 : real(from, to);
}
int unlink(const char *path) {
  REAL(int, "unlink", const char *);
  return is_it("unlink", 0) && fails() ? -1 : real(path);
}
int open64(const char *path, int flags, ...) {
  REAL(int, "open64", const char *, int, ...);
  va_list more;
  va_start(more, flags);
  int mode = va_arg(more, int);
  va_end(more);
  // What the library asks of the system by itself is not a file of the checkpoint.
  const char system = strncmp(path, "/proc", 5) == 0 || strncmp(path, "/sys", 4) == 0;
  if (!system && is_it("open64", 0) && fails()) return -1;
  const int fd = real(path, flags, mode);
  if (fd >= 0 && fd < MOST_FILES) of_the_system[fd] = system;
  return fd;
}

static void need(const char *what, pfc_status status) {
  if (status == PFC_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, pfc_status_name(status), pfc_last_error());
  exit(1);
}

static pfc_status try_step(pfc_head *head) {
  static float embeddings[BATCH * DIM], gradient[BATCH * DIM];
  int64_t labels[BATCH];
  double loss;
  for (int i = 0; i < BATCH * DIM; i++) embeddings[i] = (float)(i * 7 % 13) - 6;
  for (int i = 0; i < BATCH; i++) labels[i] = i * 100;
  pfc_matrix e = {embeddings, PFC_F32, 0, BATCH, DIM, DIM};
  pfc_matrix g = {gradient, PFC_F32, 0, BATCH, DIM, DIM};
  return pfc_head_step(head, &e, labels, 0.1, &g, &loss);
}

static void step(pfc_head *head) { need("a step", try_step(head)); }

// A step that fails before its update can be made again, one that fails in it is the head's last.
static void step_on_a_file(pfc_head *head, const char *directory) {
  step(head);
  armed = 1;
  const pfc_status status = try_step(head);
  armed = 0;
  printf("%ld\t%s\t%s\t%s\n", calls, pfc_status_name(status), status == PFC_OK ? "" : pfc_last_error(), hit);
  if (status != PFC_OK && strncmp(hit, "pwrite64", 8) == 0) {
    if (try_step(head) != PFC_ERROR_POISONED) exit(1);
    return;
  }
  if (status != PFC_OK) step(head);
  need("save", pfc_head_save(head, directory, NULL));
}

// What fails in a change of classes leaves the head with those that it had.
static void classes_on_a_file(pfc_head *head, const char *directory) {
  uint64_t first, count;
  step(head);
  armed = 1;
  const pfc_status status = pfc_head_resize(head, FEWER, NULL);
  armed = 0;
  printf("%ld\t%s\t%s\t%s\n", calls, pfc_status_name(status), status == PFC_OK ? "" : pfc_last_error(), hit);
  need("shard", pfc_head_shard(head, &first, &count));
  if (count != (status == PFC_OK ? FEWER : CLASSES)) exit(1);
  step(head);
  need("save", pfc_head_save(head, directory, NULL));
}

static pfc_status save_at_once(pfc_head *head, const char *directory) {
  return pfc_head_save(head, directory, NULL);
}

static pfc_status save_beside(pfc_head *head, const char *directory) {
  pfc_status status = pfc_head_save_start(head, directory, NULL);
  if (status == PFC_OK) step(head);
  for (int32_t done = 0; status == PFC_OK && !done; usleep(1000)) status = pfc_head_save_poll(head, &done, NULL);
  return status;
}

int main(int argc, char **argv) {
  if (argc != 5) return 2;
  pfc_device *device;
  pfc_comm *comm;
  pfc_head *head;
  pfc_head_options options;
  need("device", pfc_device_cpu(1, &device));
  need("comm", pfc_comm_self(&comm));
  need("options", pfc_head_options_init(&options));
  options.num_classes = CLASSES, options.embedding_dim = DIM;
  const int steps = strcmp(argv[2], "step") == 0, changes = strcmp(argv[2], "classes") == 0;
  char rows[4096];
  if (steps || changes) {
    snprintf(rows, sizeof rows, "%s/rows", argv[1]);
    options.residency = PFC_RESIDENCY_FILE, options.storage_path = rows;
  }
  need("head", pfc_head_create(device, comm, &options, &head));
  int in_load = strcmp(argv[2], "load") == 0;
  fault = argv[3], number = strtol(argv[4], NULL, 10);
  if (steps || changes) {
    (steps ? step_on_a_file : classes_on_a_file)(head, argv[1]);
    pfc_head_free(head), pfc_comm_free(comm), pfc_device_free(device);
    return rmdir(rows);
  }
  armed = in_load;
  pfc_status status = pfc_head_load(head, argv[1], NULL);
  armed = 0;
  if (!in_load) {
    // The first run finds no checkpoint and makes one.
    if (status != PFC_ERROR_IO) need("load", status);
    step(head);
    armed = 1;
    status = (strcmp(argv[2], "beside") == 0 ? save_beside : save_at_once)(head, argv[1]);
    armed = 0;
  }
  printf("%ld\t%s\t%s\t%s\n", calls, pfc_status_name(status), status == PFC_OK ? "" : pfc_last_error(), hit);
  if (status == PFC_OK || !in_load) step(head);
  if (status == PFC_OK && in_load) need("save", pfc_head_save(head, argv[1], NULL));
  pfc_head_free(head), pfc_comm_free(comm), pfc_device_free(device);
  return 0;
}
