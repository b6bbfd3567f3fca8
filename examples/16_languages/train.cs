// C#. Nothing reads the header here: structs and constants are written out. A rank is a thread.
using System;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;

[StructLayout(LayoutKind.Sequential)]
struct Matrix { public IntPtr Data; public int DType; public uint Reserved; public ulong Rows, Cols, RowStride; }

[StructLayout(LayoutKind.Sequential)]
struct Options {
    public ulong StructSize, NumClasses; public uint EmbeddingDim; public int Placement; public double SampleRate;
    public ulong Seed, MaxBatch; public double Scale, M1, M2, M3, InterclassFilter;
    public int MarginGradient, MarginGuard, Optimizer, RowUpdate;
    public double Momentum, WeightDecay, Beta1, Beta2, Epsilon, GradientScale, InitStd; public long IgnoreLabel;
    public int Precision, GatherDType, WeightDType, StateDType, Residency; public uint Reserved; public ulong WorkspaceLimit;
    public IntPtr StoragePath; public int RowTerms; public uint SampleBlock; public ulong StorageCache;
}

[StructLayout(LayoutKind.Sequential)]
struct Metrics {
    public ulong StructSize, Updates, Draws, Rows, ValidRows, SampleSize;
    public double Loss, Top1, MeanTargetCosine, GradEmbeddingsNorm, GradCentersNorm;
    public double SecondsGather, SecondsSample, SecondsForward, SecondsReduce, SecondsBackward, SecondsUpdate; public ulong SkippedUpdates;
}

static class Pfc {
    const string Library = "libpartialfc.so.0";
    public const int Ok = 0, F32 = 1, Sum = 1;
    [DllImport(Library)] public static extern IntPtr pfc_status_name(int status);
    [DllImport(Library)] public static extern IntPtr pfc_last_error();
    [DllImport(Library)] public static extern int pfc_device_cpu(uint threads, out IntPtr device);
    [DllImport(Library)] public static extern void pfc_device_free(IntPtr device);
    [DllImport(Library)] public static extern int pfc_comm_threads(uint n, [Out] IntPtr[] comms);
    [DllImport(Library)] public static extern int pfc_comm_all_reduce(
        IntPtr comm, float[] send, [In, Out] float[] recv, ulong count, int dtype, int op);
    [DllImport(Library)] public static extern void pfc_comm_free(IntPtr comm);
    [DllImport(Library)] public static extern int pfc_head_options_init_sized(out Options options, ulong size);
    [DllImport(Library)] public static extern int pfc_head_create(IntPtr device, IntPtr comm, ref Options options, out IntPtr head);
    [DllImport(Library)] public static extern int pfc_head_step(
        IntPtr head, ref Matrix embeddings, long[] labels, double rate, ref Matrix gradient, out double loss);
    [DllImport(Library)] public static extern int pfc_metrics_init_sized(out Metrics metrics, ulong size);
    [DllImport(Library)] public static extern int pfc_head_metrics(IntPtr head, ref Metrics metrics);
    [DllImport(Library)] public static extern int pfc_head_top_k(
        IntPtr head, ref Matrix embeddings, ulong k, [Out] long[] ids, [Out] float[] cosines);
    [DllImport(Library)] public static extern ulong pfc_head_error(IntPtr head, [Out] byte[] buffer, ulong size);
    [DllImport(Library)] public static extern void pfc_head_free(IntPtr head);
}

static class Train {
    const int Ranks = 2, Batch = 16, Dim = 64, Size = Batch * Dim; // Batch: rows of a rank

    // Of this thread's last error. A managed thread stays on its thread of the system; what follows an `await` may not.
    static string Error(int status) {
        return Marshal.PtrToStringAnsi(Pfc.pfc_status_name(status)) + ": " + Marshal.PtrToStringAnsi(Pfc.pfc_last_error());
    }

    static void Check(int status) {
        if (status == Pfc.Ok) return;
        Console.Error.WriteLine(Error(status));
        Environment.Exit(1);
    }

    static void Print(bool tells, FormattableString line) {
        if (tells) Console.WriteLine(line.ToString(CultureInfo.InvariantCulture));
    }

    // The collector moves arrays: one that a matrix points to is pinned.
    static GCHandle Pinned(float[] values, out Matrix matrix) {
        var pin = GCHandle.Alloc(values, GCHandleType.Pinned);
        matrix = new Matrix { Data = pin.AddrOfPinnedObject(), DType = Pfc.F32, Rows = Batch, Cols = Dim, RowStride = Dim };
        return pin;
    }

    static void Run(int rank, IntPtr comm, out IntPtr head) {
        bool tells = rank == 0;
        float[] x = new float[Size], e = new float[Size], de = new float[Size], v = new float[Dim], cosines = new float[Batch];
        long[] labels = new long[Batch], nearest = new long[Batch];
        Matrix embeddings, gradient;
        GCHandle pinnedE = Pinned(e, out embeddings), pinnedDe = Pinned(de, out gradient);
        for (int i = 0; i < Batch; i++) labels[i] = i % 8 * 100;
        for (int k = 0; k < Size; k++) x[k] = (float)(k / Dim % 8 * (k % Dim + 3) % 23) / 11 - 1;
        for (int k = 0; k < Dim; k++) v[k] = 1;

        IntPtr device;
        Options options;
        double loss;
        Check(Pfc.pfc_device_cpu(1, out device));
        Check(Pfc.pfc_head_options_init_sized(out options, (ulong)Marshal.SizeOf(typeof(Options))));
        Print(tells, $"options: {Marshal.SizeOf(typeof(Options))} bytes, ignore_label {options.IgnoreLabel}");
        options.NumClasses = 1000; options.EmbeddingDim = Dim; options.MaxBatch = Batch;
        options.Scale = 16; options.M2 = 0.3; options.InitStd = 0.5;
        Check(Pfc.pfc_head_create(device, comm, ref options, out head));
        Pfc.pfc_device_free(device);
        for (int step = 0; step < 20; step++) {
            for (int k = 0; k < Size; k++) e[k] = v[k % Dim] * x[k];
            Check(Pfc.pfc_head_step(head, ref embeddings, labels, 0.1, ref gradient, out loss));
            Print(tells && step % 4 == 0, $"step {step} loss {loss:F3}");
            var dv = new float[Dim];
            for (int k = 0; k < Size; k++) dv[k % Dim] += de[k] * x[k];
            Check(Pfc.pfc_comm_all_reduce(comm, dv, dv, Dim, Pfc.F32, Pfc.Sum));
            for (int k = 0; k < Dim; k++) v[k] -= 0.01f * dv[k];
        }
        Metrics metrics;
        Check(Pfc.pfc_metrics_init_sized(out metrics, (ulong)Marshal.SizeOf(typeof(Metrics))));
        Check(Pfc.pfc_head_metrics(head, ref metrics));
        Check(Pfc.pfc_head_top_k(head, ref embeddings, 1, nearest, cosines));
        Print(tells, $"updates {metrics.Updates}, target cosine {metrics.MeanTargetCosine:F3}");
        Print(tells, $"row 9 is class {nearest[9]}, cosine {cosines[9]:F3}");
        if (tells) labels[3] = -5;
        Print(tells, $"{Error(Pfc.pfc_head_step(head, ref embeddings, labels, 0.1, ref gradient, out loss))}");
        pinnedE.Free();
        pinnedDe.Free();
    }

    static void Main() {
        var comms = new IntPtr[Ranks];
        var heads = new IntPtr[Ranks];
        var threads = new Thread[Ranks];
        Check(Pfc.pfc_comm_threads(Ranks, comms));
        for (int r = 0; r < Ranks; r++) {
            int rank = r;
            threads[r] = new Thread(() => Run(rank, comms[rank], out heads[rank]));
            threads[r].Start();
        }
        foreach (var thread in threads) thread.Join();
        var text = new byte[1024];
        ulong bytes = Pfc.pfc_head_error(heads[0], text, (ulong)text.Length);
        Console.WriteLine("the head's: " + Encoding.UTF8.GetString(text, 0, (int)bytes - 1));
        foreach (var head in heads) Pfc.pfc_head_free(head);
        foreach (var comm in comms) Pfc.pfc_comm_free(comm);
    }
}
