// A session of MySQL by Go's driver: HOST, file of roots or "".
package main

import (
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"fmt"
	"os"

	"github.com/go-sql-driver/mysql"
)

func main() {
	c := mysql.NewConfig()
	c.User, c.Passwd, c.Net, c.Addr, c.DBName = "app", "mock-MYSQL_PWD", "tcp", os.Args[1]+":3306", "shop"
	if roots := os.Args[2]; roots != "" {
		pem, err := os.ReadFile(roots)
		if err != nil {
			panic(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		c.TLS = &tls.Config{RootCAs: pool, ServerName: os.Args[1]}
	}
	connector, err := mysql.NewConnector(c)
	if err != nil {
		panic(err)
	}
	db := sql.OpenDB(connector)
	var user string
	var sum int
	if err := db.QueryRow("select current_user()").Scan(&user); err != nil {
		panic(err)
	}
	if err := db.QueryRow("select sum(seq) from seq_1_to_1000 where seq > ?", 10).Scan(&sum); err != nil {
		panic(err)
	}
	fmt.Println(user, sum)
}
