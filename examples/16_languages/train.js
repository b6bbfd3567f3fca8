// Node with koffi. Nothing reads the header here: structs and constants are written out. A rank is a worker, and the ranks talk through
// functions of this program, in JavaScript, over memory that the workers share.
const koffi = require('koffi');
const { Worker, isMainThread, parentPort, workerData } = require('node:worker_threads');

const RANKS = 2, BATCH = 16, DIM = 64, SIZE = BATCH * DIM; // BATCH: rows of a rank
const OK = 0, F32 = 1, F64 = 4, I32 = 5, I64 = 6, SUM = 1;
const ARRAYS = { [F32]: Float32Array, [F64]: Float64Array, [I32]: Int32Array, [I64]: BigInt64Array };

const struct = (name, fields) =>
  koffi.struct(name, Object.fromEntries(fields.map((line) => line.split(' ')).flatMap(([type, ...names]) => names.map((n) => [n, type]))));
struct('pfc_matrix', ['void* data', 'int32 dtype', 'uint32 reserved', 'uint64 rows cols row_stride']);
const Options = struct('pfc_head_options', [
  'uint64 struct_size num_classes', 'uint32 embedding_dim', 'int32 placement', 'double sample_rate', 'uint64 seed max_batch',
  'double scale m1 m2 m3 interclass_filter', 'int32 margin_gradient margin_guard optimizer row_update',
  'double momentum weight_decay beta1 beta2 epsilon gradient_scale init_std', 'int64 ignore_label',
  'int32 precision gather_dtype weight_dtype state_dtype residency', 'uint32 reserved', 'uint64 workspace_limit', 'void* storage_path',
  'int32 row_terms', 'uint32 sample_block', 'uint64 storage_cache',
]);
const Metrics = struct('pfc_metrics', [
  'uint64 struct_size updates draws rows valid_rows sample_size', 'double loss top1 mean_target_cosine grad_embeddings_norm',
  'double grad_centers_norm seconds_gather seconds_sample seconds_forward seconds_reduce seconds_backward seconds_update',
  'uint64 skipped_updates',
]);
const Gather = koffi.proto('int32 gather(void *ctx, void *send, void *recv, uint64 bytes, void *stream)');
const Reduce = koffi.proto('int32 reduce(void *ctx, void *send, void *recv, uint64 count, int32 dtype, int32 op, void *stream)');
const Ops = struct('pfc_comm_ops', [
  'uint64 struct_size', 'void* ctx', 'uint32 rank size flags reserved', 'gather* all_gather', 'reduce* all_reduce',
  'void* reduce_scatter broadcast barrier abort async_error error_string free',
]);

const library = koffi.load('libpartialfc.so.0');
const lib = Object.fromEntries([
  'const char *pfc_status_name(int32 status)',
  'const char *pfc_last_error()',
  'int32 pfc_device_cpu(uint32 threads, _Out_ void **out)',
  'void pfc_device_free(void *device)',
  'int32 pfc_comm_ops_init_sized(_Out_ pfc_comm_ops *ops, uint64 size)',
  'int32 pfc_comm_custom(pfc_comm_ops *ops, _Out_ void **out)',
  'int32 pfc_comm_all_reduce(void *comm, void *send, void *recv, uint64 count, int32 dtype, int32 op)',
  'void pfc_comm_free(void *comm)',
  'int32 pfc_head_options_init_sized(_Out_ pfc_head_options *options, uint64 size)',
  'int32 pfc_head_create(void *device, void *comm, pfc_head_options *options, _Out_ void **out)',
  'int32 pfc_head_step(void *head, pfc_matrix *embeddings, void *labels, double rate, pfc_matrix *gradient, _Out_ double *loss)',
  'int32 pfc_metrics_init_sized(_Out_ pfc_metrics *metrics, uint64 size)',
  'int32 pfc_head_metrics(void *head, _Inout_ pfc_metrics *metrics)',
  'int32 pfc_head_top_k(void *head, pfc_matrix *embeddings, uint64 k, void *ids, void *cosines)',
  'uint64 pfc_head_error(void *head, void *buffer, uint64 size)',
  'void pfc_head_free(void *head)',
].map((text) => [/pfc_(\w+)\(/.exec(text)[1], library.func(text)]));

function check(status) {
  if (status !== OK) throw new Error(`${lib.status_name(status)}: ${lib.last_error()}`);
}

// A transport's functions: what ranks pass to each other lies in a slot of shared memory for each, behind the numbers of the meeting.
function transport(rank, shared) {
  const meeting = new Int32Array(shared, 0, 2), SLOT = (shared.byteLength - 64) / RANKS;
  const slots = (Type, count) => Array.from({ length: RANKS }, (_, r) => new Type(shared, 64 + r * SLOT, count));
  const memory = (pointer, Type, count) => new Type(koffi.view(pointer, count * Type.BYTES_PER_ELEMENT));

  // There is no abort: the library calls it from a thread of its own, and koffi runs such a call when the worker's event loop is free,
  // while the worker is blocked here. So the wait itself ends, after as long as the library would wait.
  function meet() {
    const turn = Atomics.load(meeting, 1);
    if (Atomics.add(meeting, 0, 1) === RANKS - 1) {
      Atomics.store(meeting, 0, 0);
      Atomics.add(meeting, 1, 1);
      Atomics.notify(meeting, 1);
    } else if (Atomics.wait(meeting, 1, turn, 600_000) === 'timed-out') {
      throw new Error('the other rank does not come');
    }
  }
  // koffi makes 0, which means success, of an exception.
  const coded = (run) => (...args) => { try { run(...args); return 0; } catch (error) { console.error(error); return 1; } };
  return {
    all_gather: coded((ctx, send, recv, bytes) => {
      const all = slots(Uint8Array, bytes), out = memory(recv, Uint8Array, RANKS * bytes);
      all[rank].set(memory(send, Uint8Array, bytes));
      meet();
      all.forEach((slot, r) => out.set(slot, r * bytes));
      meet(); // No slot is written while another rank reads it.
    }),
    all_reduce: coded((ctx, send, recv, count, dtype, op) => {
      const all = slots(ARRAYS[dtype], count), out = memory(recv, ARRAYS[dtype], count);
      all[rank].set(memory(send, ARRAYS[dtype], count));
      meet();
      out.set(all[0]);
      for (const slot of all.slice(1)) slot.forEach((x, i) => { out[i] = op === SUM ? out[i] + x : x > out[i] ? x : out[i]; });
      meet();
    }),
  };
}

function matrix() {
  const data = koffi.alloc('float', SIZE); // Stays where it is, unlike an array of JavaScript's.
  return [{ data, dtype: F32, reserved: 0, rows: BATCH, cols: DIM, row_stride: DIM }, new Float32Array(koffi.view(data, 4 * SIZE))];
}

function train({ rank, shared }) {
  const lines = [], ops = {}, options = {}, metrics = {}, device = [null], comm = [null], head = [null], loss = [0];
  const { all_gather, all_reduce } = transport(rank, shared);
  check(lib.comm_ops_init_sized(ops, koffi.sizeof(Ops)));
  const registered = [koffi.register(all_gather, koffi.pointer(Gather)), koffi.register(all_reduce, koffi.pointer(Reduce))];
  Object.assign(ops, { rank, size: RANKS, all_gather: registered[0], all_reduce: registered[1] });
  check(lib.comm_custom(ops, comm));

  const [embeddings, e] = matrix(), [gradient, de] = matrix();
  const labels = BigInt64Array.from({ length: BATCH }, (_, i) => BigInt(i % 8 * 100));
  const x = Float32Array.from({ length: SIZE }, (_, k) => Math.floor(k / DIM) % 8 * (k % DIM + 3) % 23 / 11 - 1);
  const v = new Float32Array(DIM).fill(1), dv = new Float32Array(DIM);
  check(lib.device_cpu(1, device));
  check(lib.head_options_init_sized(options, koffi.sizeof(Options)));
  lines.push(`options: ${koffi.sizeof(Options)} bytes, ignore_label ${options.ignore_label}`);
  Object.assign(options, { num_classes: 1000, embedding_dim: DIM, max_batch: BATCH, scale: 16, m2: 0.3, init_std: 0.5 });
  check(lib.head_create(device[0], comm[0], options, head));
  lib.device_free(device[0]);
  for (let step = 0; step < 20; step++) {
    for (let k = 0; k < SIZE; k++) e[k] = v[k % DIM] * x[k];
    check(lib.head_step(head[0], embeddings, labels, 0.1, gradient, loss));
    if (step % 4 === 0) lines.push(`step ${step} loss ${loss[0].toFixed(3)}`);
    dv.fill(0);
    for (let k = 0; k < SIZE; k++) dv[k % DIM] += de[k] * x[k];
    check(lib.comm_all_reduce(comm[0], dv, dv, DIM, F32, SUM));
    for (let k = 0; k < DIM; k++) v[k] -= 0.01 * dv[k];
  }

  const nearest = new BigInt64Array(BATCH), cosines = new Float32Array(BATCH);
  check(lib.metrics_init_sized(metrics, koffi.sizeof(Metrics)));
  check(lib.head_metrics(head[0], metrics));
  check(lib.head_top_k(head[0], embeddings, 1, nearest, cosines));
  lines.push(`updates ${metrics.updates}, target cosine ${metrics.mean_target_cosine.toFixed(3)}`);
  lines.push(`row 9 is class ${nearest[9]}, cosine ${cosines[9].toFixed(3)}`);
  if (rank === 0) labels[3] = -5n;
  const status = lib.head_step(head[0], embeddings, labels, 0.1, gradient, loss);
  lines.push(`${lib.status_name(status)}: ${lib.last_error()}`);

  // A handle is an address, which another thread of JavaScript may have. It says when it has done with it.
  parentPort.postMessage({ lines, head: head[0] });
  parentPort.once('message', () => {
    lib.head_free(head[0]);
    lib.comm_free(comm[0]);
    registered.forEach(koffi.unregister); // Not before the communicator, which calls them, has gone.
    [embeddings, gradient].forEach(({ data }) => koffi.free(data));
  });
}

async function main() {
  const shared = new SharedArrayBuffer(64 + RANKS * 65536);
  const workers = Array.from({ length: RANKS }, (_, rank) => new Worker(__filename, { workerData: { rank, shared } }));
  const message = (worker) => new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject));
  const told = await Promise.all(workers.map(message));
  const text = Buffer.alloc(1024);
  lib.head_error(told[0].head, text, text.length);
  console.log([...told[0].lines, `the head's: ${koffi.decode(text, 'char', -1)}`].join('\n'));
  workers.forEach((worker) => worker.postMessage('done'));
}

if (isMainThread) main().catch((error) => { console.error(error); process.exit(1); });
else train(workerData);
