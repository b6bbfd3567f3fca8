-- LuaJIT. Its own C parser reads the whole header, inline functions too. Lua has no threads, so here is one rank with all 32 rows.
local ffi = require("ffi")

-- -dD leaves the constants, which are macros, in the preprocessor's output.
local compiler = io.popen("cc -E -P -dD -include partialfc.h -x c $(pkg-config --cflags partialfc) /dev/null")
local header = compiler:read("*a")
compiler:close()
local PFC = {}
for name, value in header:gmatch("#define PFC_([%w_]+) (%d+)") do PFC[name] = tonumber(value) end
ffi.cdef((header:gsub("#[^\n]*", "")))
local lib = ffi.load("libpartialfc.so.0")

local BATCH, DIM = 32, 64
local SIZE = BATCH * DIM

local function check(status)
  if status ~= PFC.OK then
    error(ffi.string(lib.pfc_status_name(status)) .. ": " .. ffi.string(lib.pfc_last_error()), 2)
  end
end

-- A handle that the garbage collector frees.
local function made(kind, make, ...)
  local out = ffi.new("pfc_" .. kind .. " *[1]")
  local arguments = { ... }
  arguments[#arguments + 1] = out
  check(make(unpack(arguments)))
  return ffi.gc(out[0], lib["pfc_" .. kind .. "_free"])
end

-- 64-bit integers are cdata; a Lua number would round them.
local function integer(value) return (tostring(value):gsub("U?LL$", "")) end

-- Matrices hold plain pointers, which keep no array alive: these locals do.
local x, v, e, de = ffi.new("float[?]", SIZE), ffi.new("float[?]", DIM), ffi.new("float[?]", SIZE), ffi.new("float[?]", SIZE)
local dv, labels = ffi.new("float[?]", DIM), ffi.new("int64_t[?]", BATCH)
local embeddings = ffi.new("pfc_matrix", { e, PFC.F32, 0, BATCH, DIM, DIM })
local gradient = ffi.new("pfc_matrix", { de, PFC.F32, 0, BATCH, DIM, DIM })
for i = 0, BATCH - 1 do labels[i] = i % 8 * 100 end
for k = 0, SIZE - 1 do x[k] = math.floor(k / DIM) % 8 * (k % DIM + 3) % 23 / 11 - 1 end
for k = 0, DIM - 1 do v[k] = 1 end

local options, loss = ffi.new("pfc_head_options"), ffi.new("double[1]")
check(lib.pfc_head_options_init_sized(options, ffi.sizeof(options)))
print(("options: %d bytes, ignore_label %s"):format(ffi.sizeof(options), integer(options.ignore_label)))
options.num_classes, options.embedding_dim, options.max_batch = 1000, DIM, BATCH
options.scale, options.m2, options.init_std = 16, 0.3, 0.5
local comm = made("comm", lib.pfc_comm_self)
local head = made("head", lib.pfc_head_create, made("device", lib.pfc_device_cpu, 1), comm, options)
for step = 0, 19 do
  for k = 0, SIZE - 1 do e[k] = v[k % DIM] * x[k] end
  check(lib.pfc_head_step(head, embeddings, labels, 0.1, gradient, loss))
  if step % 4 == 0 then print(("step %d loss %.3f"):format(step, loss[0])) end
  ffi.fill(dv, ffi.sizeof(dv))
  for k = 0, SIZE - 1 do dv[k % DIM] = dv[k % DIM] + de[k] * x[k] end
  check(lib.pfc_comm_all_reduce(comm, dv, dv, DIM, PFC.F32, PFC.SUM))
  for k = 0, DIM - 1 do v[k] = v[k] - 0.01 * dv[k] end
end

local metrics = ffi.new("pfc_metrics")
check(lib.pfc_metrics_init_sized(metrics, ffi.sizeof(metrics)))
check(lib.pfc_head_metrics(head, metrics))
local nearest, cosines = ffi.new("int64_t[?]", BATCH), ffi.new("float[?]", BATCH)
check(lib.pfc_head_top_k(head, embeddings, 1, nearest, cosines))
print(("updates %s, target cosine %.3f"):format(integer(metrics.updates), metrics.mean_target_cosine))
print(("row 9 is class %s, cosine %.3f"):format(integer(nearest[9]), cosines[9]))

labels[3] = -5
local status = lib.pfc_head_step(head, embeddings, labels, 0.1, gradient, loss)
print(ffi.string(lib.pfc_status_name(status)) .. ": " .. ffi.string(lib.pfc_last_error()))
local text = ffi.new("char[1024]")
lib.pfc_head_error(head, text, ffi.sizeof(text))
print("the head's: " .. ffi.string(text))
