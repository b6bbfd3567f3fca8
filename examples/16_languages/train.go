// Go. cgo has the C compiler read the header, so that every call here is checked against it. A rank is a goroutine.
package main

/*
#cgo pkg-config: partialfc
#include <partialfc.h>
#include <stdlib.h>
*/
import "C"

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"
)

const (
	ranks = 2
	batch = 16 // rows of a rank
	dim   = 64
	size  = batch * dim
)

func check(status C.pfc_status) {
	if status != C.PFC_OK {
		fmt.Fprintf(os.Stderr, "%s: %s\n", C.GoString(C.pfc_status_name(status)), C.GoString(C.pfc_last_error()))
		os.Exit(1)
	}
}

// What C gets may not point to Go's memory, so a matrix points to C's. A slice of plain numbers may be handed over itself.
func matrix() (*C.pfc_matrix, []C.float) {
	data := (*C.float)(C.calloc(size, C.sizeof_float))
	return &C.pfc_matrix{data: unsafe.Pointer(data), dtype: C.PFC_F32, rows: batch, cols: dim, row_stride: dim},
		unsafe.Slice(data, size)
}

func train(comm *C.pfc_comm, head **C.pfc_head) {
	// The text of the last error is a thread's, and a goroutine may continue on another thread after any call.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tells := C.pfc_comm_rank(comm) == 0
	embeddings, e := matrix()
	gradient, de := matrix()
	defer C.free(embeddings.data)
	defer C.free(gradient.data)
	var labels, nearest [batch]C.int64_t
	var x [size]C.float
	var v [dim]C.float
	for i := range labels {
		labels[i] = C.int64_t(i % 8 * 100)
	}
	for k := range x {
		x[k] = C.float(k/dim%8*(k%dim+3)%23)/11 - 1
		v[k%dim] = 1
	}

	var device *C.pfc_device
	var options C.pfc_head_options
	check(C.pfc_device_cpu(1, &device))
	check(C.pfc_head_options_init(&options))
	if tells {
		fmt.Printf("options: %d bytes, ignore_label %d\n", unsafe.Sizeof(options), options.ignore_label)
	}
	options.num_classes, options.embedding_dim, options.max_batch = 1000, dim, batch
	options.scale, options.m2, options.init_std = 16, 0.3, 0.5
	check(C.pfc_head_create(device, comm, &options, head))
	C.pfc_device_free(device)
	var loss C.double
	for step := 0; step < 20; step++ {
		for k := range x {
			e[k] = v[k%dim] * x[k]
		}
		check(C.pfc_head_step(*head, embeddings, &labels[0], 0.1, gradient, &loss))
		if tells && step%4 == 0 {
			fmt.Printf("step %d loss %.3f\n", step, loss)
		}
		var dv [dim]C.float
		for k := range x {
			dv[k%dim] += de[k] * x[k]
		}
		check(C.pfc_comm_all_reduce(comm, unsafe.Pointer(&dv[0]), unsafe.Pointer(&dv[0]), dim, C.PFC_F32, C.PFC_SUM))
		for k := range v {
			v[k] -= 0.01 * dv[k]
		}
	}

	var metrics C.pfc_metrics
	var cosines [batch]C.float
	check(C.pfc_metrics_init(&metrics))
	check(C.pfc_head_metrics(*head, &metrics))
	check(C.pfc_head_top_k(*head, embeddings, 1, &nearest[0], &cosines[0]))
	if tells {
		fmt.Printf("updates %d, target cosine %.3f\n", metrics.updates, metrics.mean_target_cosine)
		fmt.Printf("row 9 is class %d, cosine %.3f\n", nearest[9], cosines[9])
		labels[3] = -5
	}
	status := C.pfc_head_step(*head, embeddings, &labels[0], 0.1, gradient, &loss)
	if tells {
		fmt.Printf("%s: %s\n", C.GoString(C.pfc_status_name(status)), C.GoString(C.pfc_last_error()))
	}
}

func main() {
	runtime.LockOSThread()
	var comms [ranks]*C.pfc_comm
	var heads [ranks]*C.pfc_head
	var all sync.WaitGroup
	check(C.pfc_comm_threads(ranks, &comms[0]))
	for r := range comms {
		all.Add(1)
		go func(r int) {
			defer all.Done()
			train(comms[r], &heads[r])
		}(r)
	}
	all.Wait()
	var text [1024]C.char
	C.pfc_head_error(heads[0], &text[0], C.uint64_t(len(text)))
	fmt.Printf("the head's: %s\n", C.GoString(&text[0]))
	for r := range comms {
		C.pfc_head_free(heads[r])
		C.pfc_comm_free(comms[r])
	}
}
