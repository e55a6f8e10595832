package kube

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/cluster"
)

// fieldOf finds the field in the decoder's messages: unknown field "spec.podSelectr".
var fieldOf = regexp.MustCompile(`^(?:unknown|duplicate) field "([^"]+)"`)

// decoder reads files of Kubernetes objects strictly: an unknown field is an error, because a misspelt `from` would
// otherwise read as "from everywhere".
type decoder struct {
	strict runtime.Decoder
}

func newDecoder() (decoder, error) {
	scheme, err := newScheme()
	if err != nil {
		return decoder{}, err
	}
	return decoder{strict: serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()}, nil
}

// content is what a file says.
type content struct {
	objects []apiObject
	// problems are not empty where a part of the file could not be read; broken are then the policies that stand in for
	// those parts that are recognisable as policies.
	problems []cluster.Problem
	broken   []*networkingv1.NetworkPolicy
}

// file reads all documents of a file.
func (d decoder) file(name string, data []byte) content {
	var c content
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for i := 1; ; i++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return c
		}
		where := fmt.Sprintf("%s document %d", name, i)
		if err != nil {
			c.fail(where, "", err)
			return c
		}
		raw, err := yaml.YAMLToJSONStrict(document)
		if err != nil {
			c.fail(where, "", fmt.Errorf("nothing of this document is read: %w", err))
			continue
		}
		if !bytes.Equal(raw, []byte("null")) {
			d.document(where, raw, &c)
		}
	}
}

// document reads one object, or the objects of a List.
func (d decoder) document(where string, raw []byte, c *content) {
	var list struct {
		metav1.TypeMeta
		Items []json.RawMessage `json:"items"`
	}
	// What is not a list of objects is reported by the strict decoder below, with the field.
	if json.Unmarshal(raw, &list) == nil && list.Kind == "List" && list.APIVersion == "v1" {
		for i, item := range list.Items {
			d.document(fmt.Sprintf("%s items[%d]", where, i), item, c)
		}
		return
	}
	decoded, _, err := d.strict.Decode(raw, nil, nil)
	object, ok := decoded.(apiObject)
	switch {
	case err != nil:
		c.failDecoding(where, raw, err)
	case !ok || !setDefaults(object):
		c.fail(where, "kind", fmt.Errorf("%s objects are not read here", decoded.GetObjectKind().GroupVersionKind().Kind))
	case object.GetName() == "":
		c.failDecoding(where, raw, errors.New("metadata.name is missing"))
	default:
		c.objects = append(c.objects, object)
	}
}

// setDefaults reports whether the object is of a kind that is used.
func setDefaults(o apiObject) bool {
	switch o.(type) {
	case *corev1.Node, *corev1.Namespace:
		o.SetNamespace("")
		return true
	case *corev1.Pod, *networkingv1.NetworkPolicy, *corev1.Service, *discoveryv1.EndpointSlice:
		if o.GetNamespace() == "" {
			o.SetNamespace(metav1.NamespaceDefault)
		}
		return true
	default:
		return false
	}
}

// failDecoding reports every fault of an object and, where it is recognisable as a policy, keeps a policy in its place
// that isolates the whole namespace.
func (c *content) failDecoding(where string, raw []byte, err error) {
	var identity metav1.PartialObjectMetadata
	var flat struct{ Name, Namespace string } // of a document that has lost its indentation
	// As much of the identity as can be read; the fault itself is reported below.
	_, _ = json.Unmarshal(raw, &identity), json.Unmarshal(raw, &flat)
	namespace, name := cmp.Or(identity.Namespace, flat.Namespace), cmp.Or(identity.Name, flat.Name)
	if name != "" {
		where += fmt.Sprintf(" (%s %s)", identity.Kind, strings.TrimPrefix(namespace+"/"+name, "/"))
	}
	if identity.Kind == "NetworkPolicy" {
		c.broken = append(c.broken, isolating(namespace, cmp.Or(name, "unnamed")))
	}
	if runtime.IsNotRegisteredError(err) {
		err = fmt.Errorf("objects of kind %q in version %q are not read here", identity.Kind, identity.APIVersion)
	}
	strict, ok := runtime.AsStrictDecodingError(err)
	if !ok {
		c.fail(where, "", err)
		return
	}
	for _, fault := range strict.Errors() {
		path := ""
		if match := fieldOf.FindStringSubmatch(fault.Error()); match != nil {
			path = match[1]
		}
		c.fail(where, path, fault)
	}
}

// isolating returns a policy that isolates every pod of the namespace in both directions.
func isolating(namespace, name string) *networkingv1.NetworkPolicy {
	policy := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: networkingv1.NetworkPolicySpec{
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
		},
	}
	setDefaults(policy)
	return policy
}

func (c *content) fail(where, path string, err error) {
	c.problems = append(c.problems, cluster.Problem{
		Code: codeFile, Object: where, Field: path, Message: shorten(err.Error()), Remedy: "correct the file",
	})
}
