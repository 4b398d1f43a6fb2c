// net/http/httputil's ReverseProxy doing what the egress path does, as its peer in bench_egress.py.
//
//	egress_go ADDRESS LEAF.PEM ORIGIN NAME ORIGIN-CA.PEM
package main

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"os"
	"sync"
)

type buffers struct{ sync.Pool }

func (b *buffers) Get() []byte  { return *b.Pool.Get().(*[]byte) }
func (b *buffers) Put(p []byte) { b.Pool.Put(&p) }

func main() {
	address, leaf, origin, name, authority := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	pem, err := os.ReadFile(authority)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "https", origin, name
			r.Out.Header.Set("Authorization", "Bearer real")
		},
		Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{RootCAs: roots, ServerName: name},
			MaxIdleConnsPerHost: 1024,
			DisableCompression:  true,
		},
		BufferPool:    &buffers{sync.Pool{New: func() any { p := make([]byte, 32768); return &p }}},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0),
	}
	server := &http.Server{Addr: address, Handler: proxy, ErrorLog: log.New(io.Discard, "", 0)}
	log.Fatal(server.ListenAndServeTLS(leaf, leaf))
}
