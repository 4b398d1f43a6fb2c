// A client and a server of net/http for test_clients.py.
//
//	lab_program serve ADDRESS LEAF.PEM AUTHORIZATION   echoes bodies as they come, over HTTP/2; says how many Authorization
//	                                                   fields there were and whether it is the one that was named
//	lab_program HOST                                   talks to it in both directions at once, three times
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	sent := r.Header["Authorization"]
	w.Header().Set("Trailer", "X-Sum")
	w.Header().Set("X-Credential", fmt.Sprint(len(sent), r.Header.Get("Authorization") == os.Args[4]))
	w.(http.Flusher).Flush()
	buffer, sum := make([]byte, 1<<16), 0
	for {
		n, err := r.Body.Read(buffer)
		_, _ = w.Write(buffer[:n])
		w.(http.Flusher).Flush()
		sum += n
		if err != nil {
			break
		}
	}
	w.Header().Set("X-Sum", fmt.Sprint(sum))
}

func serve(address, leaf string) {
	pair, err := tls.LoadX509KeyPair(leaf, leaf)
	check(err)
	config := tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}}
	listener, err := tls.Listen("tcp", address, &config)
	check(err)
	fmt.Println("ready")
	check((&http.Server{Handler: http.HandlerFunc(echo)}).Serve(listener))
}

func talk(host string) {
	reader, writer := io.Pipe()
	r, err := http.Post("https://"+host+"/", "x/y", reader)
	check(err)
	for n := 0; n < 5; n++ { // each piece is sent when the one before came back
		_, err = fmt.Fprint(writer, n)
		check(err)
		_, err = io.ReadFull(r.Body, make([]byte, 1))
		check(err)
	}
	check(writer.Close())
	rest, err := io.ReadAll(r.Body)
	check(err)
	fmt.Println(r.Proto, r.Header.Get("X-Credential"), len(rest), r.Trailer.Get("X-Sum"))
}

func main() {
	if os.Args[1] == "serve" {
		serve(os.Args[2], os.Args[3])
		return
	}
	for i := 0; i < 3; i++ {
		talk(os.Args[1])
	}
}
