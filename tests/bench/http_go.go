// The peer of bench_http.py: net/http doing for a request what our server does.
//
//	http_go ADDRESS SECRET RESOURCES.JSON AVAILABLE.JSON < instances.json
//
// Token check (HMAC, expiry, scopes), the body decoded into a struct, one JSON log line on stderr, a counter and a
// histogram by method, route and status, a request id. Standard library only: as lean as such a server can be.
package main

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"log"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

type claims struct {
	Subject     string    `json:"sub"`
	Expires     *float64  `json:"exp"`
	Permissions *[]string `json:"permissions"`
}

type failure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

type series struct {
	count   uint64
	sum     float64
	buckets [16]uint64
}

type label struct {
	method, route string
	status        int
}

var (
	secret []byte
	bounds = [16]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
	lock   sync.Mutex
	counts = map[label]*series{}
	logger = slog.New(slog.NewJSONHandler(os.Stderr, nil))
)

// allowed reports the status for a request that needs scope: 0 if it may go on.
func allowed(r *http.Request, scope string) int {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	parts := strings.Split(token, ".")
	if !ok || len(parts) != 3 {
		return 401
	}
	head, err := base64.RawURLEncoding.DecodeString(parts[0])
	var algorithm struct {
		Alg string `json:"alg"`
	}
	if err != nil || json.Unmarshal(head, &algorithm) != nil || algorithm.Alg != "HS256" {
		return 401
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(parts[0] + "." + parts[1]))
	given, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil || !hmac.Equal(given, mac.Sum(nil)) {
		return 401
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	var c claims
	if err != nil || json.Unmarshal(body, &c) != nil {
		return 401
	}
	if c.Expires != nil && *c.Expires <= float64(time.Now().Unix()) {
		return 401
	}
	if c.Permissions == nil {
		return 0
	}
	for _, name := range *c.Permissions {
		if name == scope || name == "*" {
			return 0
		}
	}
	return 403
}

type answer func(r *http.Request) (int, any)

func route(method, path, scope string, handle answer) {
	http.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		id := r.Header.Get("X-Request-Id")
		if id == "" {
			var drawn [8]byte
			rand.Read(drawn[:])
			id = hex.EncodeToString(drawn[:])
		}
		status, body := 0, any(nil)
		if scope != "" {
			if status = allowed(r, scope); status != 0 {
				body = failure{http.StatusText(status), "no"}
			}
		}
		if status == 0 {
			status, body = handle(r)
		}
		content, ready := body.([]byte)
		if !ready {
			content, _ = json.Marshal(body)
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		w.Header().Set("X-Request-Id", id)
		w.WriteHeader(status)
		w.Write(content)
		spent := time.Since(started)
		lock.Lock()
		key := label{r.Method, path, status}
		s := counts[key]
		if s == nil {
			s = &series{}
			counts[key] = s
		}
		s.count++
		s.sum += spent.Seconds()
		for i, bound := range bounds {
			if spent.Seconds() <= bound {
				s.buckets[i]++
				break
			}
		}
		lock.Unlock()
		logger.Info("request", "method", r.Method, "route", path, "status", status,
			"ms", float64(spent.Microseconds())/1000, "request_id", id, "path_id", r.PathValue("id"))
	})
}

// create is what a refused POST is checked against.
type create struct {
	Name    string            `json:"name"`
	Image   string            `json:"image"`
	Vcpus   *int              `json:"vcpus"`
	Size    string            `json:"size"`
	Env     map[string]string `json:"env"`
	Tags    map[string]string `json:"tags"`
	Network *struct {
		Enabled *bool `json:"enabled"`
	} `json:"network"`
}

type instance struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	Image      string            `json:"image"`
	State      string            `json:"state"`
	CreatedAt  time.Time         `json:"created_at"`
	ExpiresAt  *time.Time        `json:"expires_at"`
	StateError *string           `json:"state_error"`
	Size       string            `json:"size"`
	Vcpus      int               `json:"vcpus"`
	Tags       map[string]string `json:"tags,omitempty"`
	Network    struct {
		Enabled bool   `json:"enabled"`
		Name    string `json:"name"`
		IP      string `json:"ip"`
		MAC     string `json:"mac"`
	} `json:"network"`
	StartedAt *time.Time `json:"started_at"`
	StoppedAt *time.Time `json:"stopped_at"`
	ExitCode  *int       `json:"exit_code"`
	Health    struct {
		Status      string     `json:"status"`
		Successes   int        `json:"consecutive_successes"`
		Failures    int        `json:"consecutive_failures"`
		LastChecked *time.Time `json:"last_checked_at"`
		LastSuccess *time.Time `json:"last_success_at"`
		LastError   *string    `json:"last_error"`
	} `json:"health_status"`
	Volumes []string `json:"volumes"`
}

type status struct {
	Type      string  `json:"type"`
	Capacity  int64   `json:"capacity"`
	Limit     int64   `json:"effective_limit"`
	Allocated int64   `json:"allocated"`
	Available int64   `json:"available"`
	Ratio     float64 `json:"oversub_ratio"`
	Source    string  `json:"source"`
}

type allocation struct {
	ID       string `json:"instance_id"`
	Name     string `json:"instance_name"`
	CPU      int    `json:"cpu"`
	Memory   int64  `json:"memory_bytes"`
	Disk     int64  `json:"disk_bytes"`
	Download int64  `json:"network_download_bps"`
	Upload   int64  `json:"network_upload_bps"`
	DiskIO   int64  `json:"disk_io_bps"`
}

type resources struct {
	CPU         status       `json:"cpu"`
	Memory      status       `json:"memory"`
	Disk        status       `json:"disk"`
	Network     status       `json:"network"`
	Allocations []allocation `json:"allocations"`
	DiskIO      status       `json:"disk_io"`
	GPU         *struct{}    `json:"gpu"`
}

type device struct {
	Address string  `json:"pci_address"`
	Vendor  string  `json:"vendor_id"`
	Device  string  `json:"device_id"`
	Names   string  `json:"vendor_name,omitempty"`
	Name    string  `json:"device_name,omitempty"`
	Group   int     `json:"iommu_group"`
	Driver  *string `json:"current_driver"`
}

func load(path string, into any) {
	content, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(content, into)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	address := os.Args[1]
	secret = []byte(os.Args[2])
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		log.Fatal(err)
	}
	// Answered from values, as a Go server would, not from stored bytes.
	byName := map[string]*instance{}
	var all []*instance
	if err := json.Unmarshal(input, &all); err != nil {
		log.Fatal(err)
	}
	for _, one := range all {
		byName[one.Name] = one
	}
	route("GET", "/health", "", func(r *http.Request) (int, any) {
		return 200, struct {
			Status string `json:"status"`
		}{"ok"}
	})
	route("GET", "/instances/{id}", "instance:read", func(r *http.Request) (int, any) {
		if one, ok := byName[r.PathValue("id")]; ok {
			return 200, one
		}
		return 404, failure{"not_found", "there is no such instance"}
	})
	var held resources
	var available []device
	load(os.Args[3], &held)
	load(os.Args[4], &available)
	route("GET", "/resources", "resource:read", func(r *http.Request) (int, any) { return 200, held })
	route("GET", "/devices/available", "device:read", func(r *http.Request) (int, any) { return 200, available })
	route("POST", "/instances", "instance:write", func(r *http.Request) (int, any) {
		var body create
		if err := json.NewDecoder(io.LimitReader(r.Body, 2<<20)).Decode(&body); err != nil {
			return 400, failure{"Bad Request", err.Error()}
		}
		if body.Vcpus != nil && *body.Vcpus < 1 {
			return 400, failure{"Bad Request", "vcpus must be 1 or more"}
		}
		return 501, failure{"not_supported", "the peer creates nothing"}
	})
	log.Fatal(http.ListenAndServe(address, nil))
}
