// What Go's crypto/x509 says of chains: reads {"name": {"roots": PEM, "sent": PEM, "host": name}} on stdin, writes
// {"name": "" or the reason} on stdout. An independent opinion for test_paths.py.
package main

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
)

type chain struct{ Roots, Sent, Host string }

func parse(text string) (found []*x509.Certificate, err error) {
	rest := []byte(text)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return found, nil
		}
		one, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		found = append(found, one)
	}
}

func verdict(c chain) error {
	roots, err := parse(c.Roots)
	if err != nil {
		return err
	}
	sent, err := parse(c.Sent)
	if err != nil {
		return err
	}
	options := x509.VerifyOptions{DNSName: c.Host, Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool()}
	for _, one := range roots {
		options.Roots.AddCert(one)
	}
	for _, one := range sent[1:] {
		options.Intermediates.AddCert(one)
	}
	_, err = sent[0].Verify(options)
	return err
}

func main() {
	var chains map[string]chain
	if err := json.NewDecoder(os.Stdin).Decode(&chains); err != nil {
		panic(err)
	}
	said := map[string]string{}
	for name, one := range chains {
		said[name] = ""
		if err := verdict(one); err != nil {
			said[name] = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(said); err != nil {
		panic(err)
	}
}
