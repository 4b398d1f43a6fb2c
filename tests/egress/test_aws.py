"""boto3 in a guest with placeholder keys, against moto's server, which is made to check the signatures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from textwrap import dedent

import pytest

from tests.egress.lab import ORIGINS, S3_HOST, Lab, a_lab
from tests.egress.lab_moto import KEY_ID, SECRET, TOKEN

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with a_lab(tmp_path_factory.mktemp("aws")) as made:
        server = made.start(made.world, sys.executable, "-m", "tests.egress.lab_moto", str(made.dir / "leaf.pem"),
                            ORIGINS[S3_HOST])  # fmt: skip
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        yield made


def test_boto3(lab: Lab) -> None:
    """Awkward names, uploads in one piece, in chunks with a trailer, in parts; presigned URLs; a table."""
    code = f"""
    import io, json, urllib.request
    import boto3, botocore.exceptions
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    config = Config(region_name="eu-west-1", signature_version="v4", s3={{"addressing_style": "path"}},
                    retries={{"total_max_attempts": 1}})
    s3 = boto3.client("s3", config=config.merge(Config(signature_version="s3v4")))
    s3.create_bucket(Bucket="bucket", CreateBucketConfiguration={{"LocationConstraint": "eu-west-1"}})
    names = ["plain", "with space+plus", "a/b//c", "é~!*'()", "a=b&c?d%20"]
    for name in names:
        s3.put_object(Bucket="bucket", Key=name, Body=name.encode(), Metadata={{"m": " a  b "}})
    said = {{"read": [s3.get_object(Bucket="bucket", Key=name)["Body"].read().decode() for name in names],
             "listed": sorted(each["Key"] for each in s3.list_objects_v2(Bucket="bucket", Prefix="")["Contents"])}}
    big = bytes(range(256)) * 4096 * 6
    parts = TransferConfig(multipart_chunksize=5 << 20, max_concurrency=2)
    s3.upload_fileobj(io.BytesIO(big), "bucket", "big", Config=parts)
    out = io.BytesIO()
    s3.download_fileobj("bucket", "big", out)
    said["big"] = out.getvalue() == big
    url = s3.generate_presigned_url("get_object", {{"Bucket": "bucket", "Key": "with space+plus"}}, ExpiresIn=600)
    said["presigned"] = urllib.request.urlopen(url).read().decode()
    url = s3.generate_presigned_url("put_object", {{"Bucket": "bucket", "Key": "new"}}, ExpiresIn=600)
    urllib.request.urlopen(urllib.request.Request(url, b"put", {{"Content-Type": "a/b"}}, method="PUT")).read()
    said["put"] = s3.get_object(Bucket="bucket", Key="new")["Body"].read().decode()
    table = boto3.client("dynamodb", config=config)
    table.create_table(TableName="t", BillingMode="PAY_PER_REQUEST",
                       KeySchema=[{{"AttributeName": "k", "KeyType": "HASH"}}],
                       AttributeDefinitions=[{{"AttributeName": "k", "AttributeType": "S"}}])
    table.put_item(TableName="t", Item={{"k": {{"S": "é"}}, "v": {{"S": "x" * 100_000}}}})
    said["item"] = len(table.get_item(TableName="t", Key={{"k": {{"S": "é"}}}})["Item"]["v"]["S"])
    try:
        boto3.client("s3", config=config.merge(Config(region_name="us-east-1")),
                     endpoint_url="https://{S3_HOST}").list_buckets()
    except botocore.exceptions.ClientError as error:
        said["elsewhere"] = error.response["ResponseMetadata"]["HTTPHeaders"]["x-hypeman-egress"]
    print(json.dumps(said))
    """
    text = lab.in_guest(
        sys.executable, "-c", dedent(code), AWS_CA_BUNDLE=str(lab.dir / "bundle.pem"),
        AWS_ACCESS_KEY_ID="mock-AWS", AWS_SECRET_ACCESS_KEY="mock-AWS", AWS_EC2_METADATA_DISABLED="true",
    )  # fmt: skip
    names = ["plain", "with space+plus", "a/b//c", "é~!*'()", "a=b&c?d%20"]
    assert json.loads(text) == {
        "read": names, "listed": sorted(names), "big": True, "presigned": "with space+plus", "put": "put",
        "item": 100_000, "elsewhere": "signature_refused",
    }  # fmt: skip
    assert not any(secret in text for secret in (KEY_ID, SECRET, TOKEN))
