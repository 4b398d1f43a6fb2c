// Reads compose files with compose-go: for each line of standard input, the path of a file, one line of JSON.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/compose-spec/compose-go/v2/cli"
)

type answer struct {
	Error   string `json:"error,omitempty"`
	Project any    `json:"project,omitempty"`
}

func load(path string) answer {
	options, err := cli.NewProjectOptions([]string{path}, cli.WithName("case"), cli.WithWorkingDirectory(filepath.Dir(path)),
		cli.WithEnvFiles(), cli.WithDotEnv, cli.WithInterpolation(true), cli.WithResolvedPaths(true), cli.WithProfiles([]string{}))
	if err != nil {
		return answer{Error: err.Error()}
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Project: project}
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		if err := out.Encode(load(lines.Text())); err != nil { // some projects that it loads cannot be written
			fmt.Fprintln(os.Stderr, err)
			_ = out.Encode(answer{Error: err.Error()})
		}
	}
}
